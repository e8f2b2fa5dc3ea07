"""`python -m granite_kernels`: the command line."""

import importlib

if __name__ == "__main__":
    importlib.import_module("granite_kernels.model.cli").main()
