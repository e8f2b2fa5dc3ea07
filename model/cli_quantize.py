"""`quantize`: write a checkpoint quantized, so that it loads without quantizing again."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click

from granite_kernels.errors import GraniteError

from .sources import RANDOM, resolve

GGUF = ("q8_0", "q6_k", "q4_k_m")


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--format", "quantization", metavar="F", required=True, help="q8_0, q6_k, q4_k_m (a GGUF file); int8, int4 (safetensors).")
@click.option("--output", metavar="DIR", required=True, type=click.Path(path_type=Path), help="A folder to make, or an empty one.")
@click.option("--device", default=None, help="cuda, cuda:1 or cpu. Default: the first GPU, else the CPU.")
def quantize(model: str, quantization: str, output: Path, device: str | None) -> None:
    """Write MODEL, in 16 or 32 bits, quantized.

    q8_0, q6_k and q4_k_m become a GGUF file in DIR, which llama.cpp reads, too; int8 and int4 make DIR a folder of safetensors in the
    layout of compressed-tensors. Either loads to the same weights as `--quantization F` makes of MODEL.
    """
    if model.startswith(RANDOM):
        raise GraniteError("random weights have no checkpoint to quantize; generate and bench take --quantization")
    begun = time.perf_counter()
    result = write(resolve(model), quantization, output, device)
    size = sum(file.stat().st_size for file in (result.iterdir() if result.is_dir() else [result]))
    click.echo(f"{result}  ({size:,} bytes, {time.perf_counter() - begun:.1f} s)")


def write(source: str | Path, quantization: str, output: Path, device: str | None) -> Path:
    """Quantize `source` into the folder `output`; returns what to load, a GGUF file or `output` itself.

    Nothing is left behind where it fails. Raises GraniteError, also for an `output` that holds something already.
    """
    from .checkpoint import open_checkpoint
    from .loading import resolve_device
    from .progress import loading_bar
    from .quantization import plan
    from .write_gguf import quantized, write_gguf
    from .write_safetensors import write_safetensors

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GraniteError(f"{output}: is there already; expected a new or an empty folder, so choose another --output")
    where = resolve_device(device)
    with open_checkpoint(source) as checkpoint:
        chosen = plan(checkpoint.tensors, checkpoint.config.num_hidden_layers, quantization, checkpoint.path)
        if quantization not in GGUF and checkpoint.kind == "gguf":
            raise GraniteError(
                f"{checkpoint.path}: {quantization} is written for folders of safetensors; expected {', '.join(GGUF)} for a GGUF"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            with loading_bar(len(checkpoint.tensors), "quantizing") as advance:
                if quantization in GGUF:
                    file = f"{checkpoint.path.stem}-{quantization.upper()}.gguf"
                    write_gguf(checkpoint, chosen, quantization, part / file, lambda entry: quantized(checkpoint, entry, where), advance)
                else:
                    file = ""
                    write_safetensors(checkpoint, chosen, part, where, advance)
            output.mkdir(exist_ok=True)
            for made in part.iterdir():
                made.rename(output / made.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return output / file
