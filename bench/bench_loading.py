"""Loading a random Granite 3.1 2B checkpoint, 5 GB of bfloat16 in two shards: time and anonymous memory.

    python bench/bench_loading.py FOLDER [--keep] [--quantization q4_k_m | --gguf q4_k_m]

Writes the checkpoint to FOLDER where there is none, reads it once so that its pages are in the system's cache, then measures in
processes of their own: `safetensors.torch.load_file` of both shards plus one clone of each tensor; `from_pretrained`, the search for
NaN and infinities included; and reading all tensors with the search less reading them without. With --quantization, only
`from_pretrained` with it, on the CPU. With --gguf, a GGUF file of 2B's shapes in that mix, of random blocks: `from_pretrained` of it,
its blocks repacked into planes on the CPU, and the time that reading them alone takes.
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


GGUF = (
    BASE
    + """
from granite_kernels import GraniteForCausalLM
from granite_kernels.model.checkpoint import open_checkpoint
with open_checkpoint(folder) as checkpoint:
    begun = time.perf_counter()
    for name in checkpoint.tensors:
        checkpoint.read(name)
    reading = time.perf_counter() - begun
before, begun = anonymous(), time.perf_counter()
model = GraniteForCausalLM.from_pretrained(folder, device="cpu", backend="torch")
taken = time.perf_counter() - begun
memory = model.memory()
print(json.dumps({"seconds": taken, "reading": reading, "anonymous": anonymous() - before,
                  "weights": memory.weights, "bits": memory.bits_per_weight, "threads": torch.get_num_threads()}))
"""
)


def write_random_gguf(file: Path, quantization: str) -> None:
    """2B in the mix `quantization`, every matrix of one format and width made of the same blocks."""
    import torch
    from granite_kernels.model.checkpoint.random import RandomCheckpoint
    from granite_kernels.model.quantization import plan
    from granite_kernels.model.write_gguf import Entry, write_gguf

    from granite_kernels import GraniteConfig, formats

    config = GraniteConfig.preset("3.1-2b")
    checkpoint = RandomCheckpoint(config, seed=0, dtype=torch.bfloat16, device=torch.device("cpu"))
    rows: dict[tuple[str, int], torch.Tensor] = {}

    def content(entry: Entry) -> torch.Tensor:
        if len(entry.shape) == 1:
            return torch.ones(entry.shape)
        format, key = formats.get_gguf(entry.format), (entry.format, entry.shape[1])
        if key not in rows:
            matrix = torch.empty(64, entry.shape[1]).uniform_(-0.05, 0.05)
            rows[key] = format.blocks(format.quantize(matrix), matrix.shape)
        return rows[key].repeat(-(-entry.shape[0] // 64), 1)[: entry.shape[0]]

    file.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(checkpoint, plan(checkpoint.tensors, config.num_hidden_layers, quantization, file), quantization, file, content, print)


def repack(file: Path, quantization: str) -> None:
    if not file.exists():
        write_random_gguf(file, quantization)
    measure(GGUF, str(file))
    found = measure(GGUF, str(file))
    print(
        f"from_pretrained of {quantization}: {found['seconds']:.2f} s with {found['threads']} threads, of which {found['reading']:.2f} s "
        f"go into reading; {found['anonymous'] / 1e9:.2f} GB anonymous, {found['weights'] / 1e9:.3f} GB of weights, "
        f"{found['bits']:.2f} bits a weight"
    )


def measure(script: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint where it is")
    parser.add_argument("--quantization", help="quantize while loading: int8, int4, q8_0, q6_k or q4_k_m")
    parser.add_argument("--gguf", help="repack a GGUF file in this mix: q8_0, q6_k or q4_k_m")
    arguments = parser.parse_args()
    if arguments.gguf:
        file = arguments.folder / f"random-{arguments.gguf}.gguf"
        repack(file, arguments.gguf)
        if not arguments.keep:
            file.unlink()
        return
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
