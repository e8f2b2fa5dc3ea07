"""Compile the launches of a function and print their metrics, one JSON line each."""

import argparse
import json
import sys

from .child import answer, compiled
from .metrics import to_json


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m granite_kernels.bench.offline", description=__doc__)
    parser.add_argument("entry", help="package.module:function or path/file.py:function")
    parser.add_argument("--arch", type=int, action="append", help="target, as 90; may be repeated")
    parser.add_argument("--streamed", action="append", default=[], help="an argument that is read exactly once; may be repeated")
    options = parser.parse_args()
    for metrics in compiled(options.entry, options.arch or [90], streamed=options.streamed):
        print(json.dumps(to_json(metrics)))


if sys.argv[1:2] == ["--call"]:
    answer(sys.argv[2])
else:
    main()
