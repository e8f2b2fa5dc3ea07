"""Loading a random Granite 3.1 2B checkpoint, 5 GB of bfloat16 in two shards: time and anonymous memory.

    python bench/bench_loading.py FOLDER [--keep] [--quantization q4_k_m]

Writes the checkpoint to FOLDER where there is none, reads it once so that its pages are in the system's cache, then measures in
processes of their own: `safetensors.torch.load_file` of both shards plus one clone of each tensor; `from_pretrained`, the search for
NaN and infinities included; and reading all tensors with the search less reading them without. With --quantization, only
`from_pretrained` with it, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

BASE = """
import json, sys, time
from pathlib import Path
import torch
folder = Path(sys.argv[1])

def anonymous():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
"""

THEIRS = (
    BASE
    + """
from safetensors.torch import load_file
begun = time.perf_counter()
tensors = {}
for shard in sorted(folder.glob("*.safetensors")):
    tensors.update({name: tensor.clone() for name, tensor in load_file(shard).items()})
print(json.dumps({"seconds": time.perf_counter() - begun, "anonymous": anonymous()}))
"""
)

OURS = (
    BASE
    + """
import threading
from granite_kernels import GraniteForCausalLM
import granite_kernels.model.tokenizer
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
begun = time.perf_counter()
model = GraniteForCausalLM.from_pretrained(folder, device="cpu", quantization=sys.argv[2] if sys.argv[2:] else None)
taken = time.perf_counter() - begun
done.set()
watcher.join()
after = anonymous()
memory = model.memory()
print(json.dumps({"seconds": taken, "anonymous": after - before, "peak": max(peak, after) - before, "weights": memory.weights,
                  "bits": memory.bits_per_weight}))
"""
)

SEARCH = (
    BASE
    + """
from granite_kernels.model.checkpoint import open_checkpoint
def read(check):
    with open_checkpoint(folder, check_finite=check) as checkpoint:
        begun = time.perf_counter()
        for name in checkpoint.tensors:
            checkpoint.read(name)
        return time.perf_counter() - begun
read(True)
print(json.dumps({"seconds": read(True) - read(False)}))
"""
)


def write_checkpoint(folder: Path) -> None:
    """A random 2B checkpoint under transformers' names: two shards and their index."""
    import torch
    from granite_kernels.model.checkpoint.layout import expected_tensors
    from safetensors.torch import save_file

    from granite_kernels import GraniteConfig

    config = GraniteConfig.preset("3.1-2b")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    table = list(expected_tensors(config).items())
    generator, where = torch.Generator().manual_seed(0), {}
    for number, part in enumerate((table[: len(table) // 2], table[len(table) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        tensors = {
            name: torch.empty(expected.shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator) for name, expected in part
        }
        save_file(tensors, folder / file)
        where.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def measure(script: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint where it is")
    parser.add_argument("--quantization", help="quantize while loading: int8, int4, q8_0, q6_k or q4_k_m")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").exists():
        write_checkpoint(arguments.folder)
    folder = str(arguments.folder)
    measure(THEIRS, folder)
    if arguments.quantization:
        found = measure(OURS, folder, arguments.quantization)
        print(
            f"from_pretrained with {arguments.quantization}: {found['seconds']:.1f} s, {found['peak'] / 1e9:.2f} GB anonymous at "
            f"most above the start, {found['weights'] / 1e9:.3f} GB of weights, {found['bits']:.2f} bits a weight"
        )
    else:
        compare(folder)
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


def compare(folder: str) -> None:
    theirs, checked, search = measure(THEIRS, folder), measure(OURS, folder), measure(SEARCH, folder)
    size = checked["weights"] / 1e9
    print(f"load_file and a clone: {theirs['seconds']:.2f} s, {theirs['anonymous'] / 1e9:.2f} GB anonymous")
    print(f"from_pretrained: {checked['seconds']:.2f} s, {checked['anonymous'] / 1e9:.2f} GB anonymous over {size:.2f} GB of weights")
    print(f"the search for NaN and infinities: {search['seconds'] / size:.3f} s a GB")
    print(f"ratio of times {checked['seconds'] / theirs['seconds']:.2f}")


if __name__ == "__main__":
    main()
