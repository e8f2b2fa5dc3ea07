"""Packages are listed by hand because model/ and bench/ stand at the top of the repository and install below granite_kernels."""

from setuptools import setup

PACKAGES = {
    "granite_kernels": "granite_kernels",
    "granite_kernels.formats": "granite_kernels/formats",
    "granite_kernels.kernels": "granite_kernels/kernels",
    "granite_kernels.linear": "granite_kernels/linear",
    "granite_kernels.reference": "granite_kernels/reference",
    "granite_kernels.model": "model",
    "granite_kernels.model.checkpoint": "model/checkpoint",
    "granite_kernels.model.hf": "model/hf",
    "granite_kernels.bench": "bench",
    "granite_kernels.bench.offline": "bench/offline",
}

setup(packages=list(PACKAGES), package_dir=PACKAGES, package_data={"granite_kernels": ["py.typed"]})
