"""lm-eval on our class, and on transformers' beside it: `python -m granite_kernels.bench.evaluate MODEL --tasks ...`.

Our model goes to lm-eval's HFLM as `as_transformers()`, so tasks, prompts, batching and metrics are lm-eval's own. `--against transformers`
runs the same tasks with the same seeds on the model that transformers loads from the same files (a GGUF dequantized), and prints how far
apart the answers are. Needs `pip install "granite-kernels[eval]"`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from granite_kernels.errors import GraniteError

TASKS = Path(__file__).parent / "tasks"
LOCAL = ("granite_kernels_facts", "granite_kernels_series", "granite_kernels_prose")  # of questions of our own, in TASKS
SEED = 1234


def tokenizer_of(source: str | Path) -> Any:
    """transformers' tokenizer for a hub id, a folder or a GGUF file of an architecture that transformers reads."""
    from transformers import AutoTokenizer

    path = Path(source)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(source)


def ours(source: str | Path, **options: Any) -> Any:
    """Our model of `source` as lm-eval takes it; `options` of from_pretrained."""
    from granite_kernels import GraniteForCausalLM

    return GraniteForCausalLM.from_pretrained(source, **options).as_transformers()


def theirs(source: str | Path, dtype: str) -> Any:
    """transformers' model of the same files; `dtype` "auto" is the checkpoint's."""
    import torch
    from transformers import AutoModelForCausalLM

    path, kind = Path(source), dtype if dtype == "auto" else getattr(torch, dtype)
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=kind).eval()
    return AutoModelForCausalLM.from_pretrained(source, dtype=kind).eval()


def evaluate(model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int = 8, **options: Any) -> dict[str, Any]:
    """lm-eval's results of `tasks` (its own, or LOCAL); `options` of its simple_evaluate, such as num_fewshot and limit."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise GraniteError(f'lm-eval is needed ({error}): pip install "granite-kernels[eval]"') from error
    manager = TaskManager(include_path=str(TASKS) if TASKS.is_dir() else None)  # ours are in the repository, not in the wheel
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    with contextlib.chdir(TASKS.parents[1]):  # which the paths in our task files start from
        found: dict[str, Any] = simple_evaluate(
            model=adapter,
            tasks=list(tasks),
            task_manager=manager,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
            bootstrap_iters=0,
            **options,
        )
    return found


def metrics(found: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(task, metric) -> value."""
    return {
        (task, name.split(",")[0]): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "_stderr" not in name
    }


def answers(found: dict[str, Any]) -> list[Any]:
    """What the model answered, request by request: numbers for likelihoods, text for generations."""
    flat = []
    for _, samples in sorted(found["samples"].items()):
        for sample in sorted(samples, key=lambda one: one["doc_id"]):
            flat += [answer[0] if isinstance(answer, list) else answer for answer in sample["resps"]]
    return flat


def furthest(left: Sequence[Any], right: Sequence[Any]) -> tuple[float, int]:
    """(largest difference of two log likelihoods, number of texts that differ) between two lists of `answers`."""
    distance, texts = 0.0, 0
    for a, b in zip(left, right, strict=True):
        if isinstance(a, str):
            texts += a != b
        else:
            first, second = (value[0] if isinstance(value, tuple | list) else value for value in (a, b))
            distance = max(distance, abs(first - second))
    return distance, texts


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--tasks", default=",".join(LOCAL), help="Of lm-eval, with commas between; by default our own small ones.")
@click.option("--num-fewshot", type=int)
@click.option("--limit", type=int, help="Questions a task.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--apply-chat-template", is_flag=True)
@click.option("--fewshot-as-multiturn", is_flag=True)
@click.option("--confirm-run-unsafe-code", is_flag=True, help="For tasks that run the model's programs: humaneval, mbpp.")
@click.option("--tokenizer", help="Hub id or folder, where MODEL is a GGUF that transformers has no tokenizer for.")
@click.option("--quantization")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--device")
@click.option("--backend", default="auto", show_default=True)
@click.option("--against", type=click.Choice(["transformers"]), help="Run the same tasks on transformers' model of the same files.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="All results as JSON.")
def main(
    model: str,
    tasks: str,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    apply_chat_template: bool,
    fewshot_as_multiturn: bool,
    confirm_run_unsafe_code: bool,
    tokenizer: str | None,
    quantization: str | None,
    dtype: str,
    device: str | None,
    backend: str,
    against: str | None,
    output: Path | None,
) -> None:
    """lm-eval's metrics of MODEL (a hub id, a folder, a .gguf file, or demo)."""
    from granite_kernels.model.sources import resolve

    source = resolve(model)
    words = tokenizer_of(tokenizer or source)
    options: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    options |= {"fewshot_as_multiturn": fewshot_as_multiturn, "confirm_run_unsafe_code": confirm_run_unsafe_code}
    names, engine = tasks.split(","), ours(source, quantization=quantization, dtype=dtype, device=device, backend=backend)
    found = {"granite-kernels": evaluate(engine, words, names, batch_size=batch_size, **options)}
    if against is not None:
        kind = str(engine.dtype).removeprefix("torch.")
        found[against] = evaluate(theirs(source, kind).to(engine.device), words, names, batch_size=batch_size, **options)
    show(found)
    if output is not None:
        values = {name: {f"{task}/{metric}": value for (task, metric), value in metrics(one).items()} for name, one in found.items()}
        output.write_text(json.dumps({"model": model, "seed": SEED, "metrics": values}, indent=1) + "\n")


def show(found: dict[str, dict[str, Any]]) -> None:
    """A row a metric, a column an implementation; below, how far apart the answers are."""
    from granite_kernels.model.cli_tables import console, table

    values = {name: metrics(one) for name, one in found.items()}
    shown = table("task", "metric", *values)
    for task, metric in next(iter(values.values())):
        shown.add_row(task, metric, *(f"{one[task, metric]:.6g}" for one in values.values()))
    console().print(shown)
    if len(found) == 2:
        distance, texts = furthest(*(answers(one) for one in found.values()))
        click.echo(f"log likelihoods at most {distance:.2g} apart, {texts} generated texts differ")


if __name__ == "__main__":
    from granite_kernels.model.cli import guarded

    raise SystemExit(guarded(lambda: main(prog_name="evaluate", standalone_mode=False)))
