"""One implementation end to end: pp512, tg128 @ d1024 and so on, as rows. Runs in a process of its own (see run.py).

ppN: a prompt of N tokens to its first new token. tgN @ dC: N steps behind a prompt of C tokens (one, at context 0). Every engine is
verified against the plain PyTorch path of the same weights before it is timed. Where several engines are measured in turns, each waits
before every timed request until the others have made theirs, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from granite_kernels.errors import GraniteError

from .child import TURN
from .engines import STATIC, TRANSFORMERS, Engine, Ours, stored_format, transformers_from
from .harness import OURS, first_line
from .meters import Meters
from .rows import ERROR, LEFT_OUT, OK, REFUSED, Row
from .shapes import step_bytes

LEAST = 2  # requests, where time is short and more were wanted
WINDOW = 4  # tokens: what ours hands over at a time on a GPU; times of a token are means over so many, for everybody
# root mean square of a difference over the logits' own spread: rounding through 40 layers gives a tenth of it, a fault about 1
DISAGREEMENT = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
VERIFIED = {"cuda": 48, "cpu": 8}  # tokens of the text, half of them prompt: on a GPU more than the 16 that decoding kernels take
FIRST_ID = 1000  # random prompts leave the special tokens out


@dataclasses.dataclass(frozen=True)
class Test:
    """`prompt` tokens, then `new` ones; a prompt's test has one new token, a generation's a context of `context` tokens."""

    name: str
    batch: int
    context: int
    prompt: int
    new: int

    @property
    def work(self) -> int:
        return self.batch * (self.prompt + 8 * self.new)


def plan(prompts: Sequence[int], generated: int, contexts: Sequence[int], batches: Sequence[int]) -> list[Test]:
    """The tests of a run, small ones first."""
    tests = [Test(f"pp{tokens}", batch, 0, tokens, 1) for tokens in prompts for batch in batches]
    tests += [Test(f"tg{generated}", batch, context, max(context, 1), generated + 1) for context in contexts for batch in batches]
    return sorted(tests, key=lambda test: test.work)


def run(
    *,
    implementation: str,
    model: str,
    label: str,
    options: dict[str, Any],
    tests: Sequence[Sequence[Any]],
    repeats: int,
    bandwidth: float,
    seconds: float,
    turns: bool = False,
) -> Iterator[Row]:
    """The rows of one implementation of `model`; `options` as `open_model` takes them, `label` its name in the rows.

    `bandwidth`: measured bytes a second; `seconds`: what all of it may take, loading included; `turns`: whether TURN is yielded before
    every timed request.
    """
    from granite_kernels.model.sources import open_model

    about: Row = {"kind": "speed", "model": label, "implementation": implementation, "format": options.get("quantization") or "as stored"}
    wanted = [Test(*test) for test in tests]
    clock = Clock(time.time() + seconds, turns)
    try:
        ours = Ours(open_model(model, **options))
    except GraniteError as error:
        yield about | {"test": "all", "batch": None, "context": 0, "status": LEFT_OUT, "note": str(error)}
        return
    config, dtype = ours.model.config, ours.model.dtype
    about["format"] = options.get("quantization") or stored_format(ours.model)
    device, plain = ours.model.device, ours.plain()
    engine: Engine = ours if implementation == OURS else transformers_from(ours.model, implementation)
    alone = implementation == OURS and not any(choice.active for choice in ours.model.kernels())  # it is the plain path
    disagreement = 0.0 if alone else differs(engine, plain, config.vocab_size, device)
    del plain, ours  # where it isn't the engine only the weights stay, which are shared
    if not disagreement <= DISAGREEMENT[dtype]:
        note = f"logits differ from the plain path's by {disagreement:.3f} of their spread: wrong, so not timed"
        yield about | {"test": "all", "batch": None, "context": 0, "status": REFUSED, "note": note}
        return
    meters = Meters(device)
    rate = Rates()
    for test in wanted:
        row = about | {"test": test.name, "batch": test.batch, "context": test.context}
        limit = config.max_position_embeddings
        if test.prompt + test.new > limit:
            yield row | {"status": LEFT_OUT, "note": f"the model's context is {limit}"}
            continue
        needed = rate.seconds(test) * (1 + min(repeats, LEAST))
        if needed > clock.left:
            note = "the time of this run is up" if needed < 1 else f"would take some {needed:.0f} s, more than this run has left"
            yield row | {"status": LEFT_OUT, "note": f"{note}; --minutes gives more"}
            continue
        try:
            figures = yield from measure(engine, test, repeats, config.vocab_size, meters, rate, clock)
        except (GraniteError, torch.OutOfMemoryError, MemoryError) as error:
            meters.forget()
            yield row | {"status": LEFT_OUT, "note": first_line(error)}
            continue
        except Exception as error:
            yield row | {"status": ERROR, "note": first_line(error)}
            continue
        if test.new > 1:
            read = step_bytes(config, engine.weight_bytes, dtype, test.context + test.new / 2, test.batch)
            figures["gbps"] = read * figures["tokens_per_second"] / test.batch / 1e9
            figures["mbu"] = 1e9 * figures["gbps"] / bandwidth
        yield row | {"status": OK, "disagreement": disagreement, **figures}


def differs(engine: Engine, plain: Ours, vocab: int, device: torch.device) -> float:
    """The root mean square difference of the logits of a short text, over their standard deviation."""
    ids = random_ids(1, VERIFIED[device.type], vocab, device)
    with torch.no_grad():
        actual, expected = engine.logits(ids).float(), plain.logits(ids).float()
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


def random_ids(batch: int, tokens: int, vocab: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(FIRST_ID, vocab // 2), vocab, (batch, tokens), generator=generator).to(device)


class Clock:
    """The time of an engine: until when it may measure, put off by what it waits for its turn."""

    def __init__(self, until: float, turns: bool = False) -> None:
        self.until, self.turns = until, turns

    @property
    def left(self) -> float:
        return self.until - time.time()

    def turn(self) -> Iterator[Row]:
        """Lets the others go first."""
        if self.turns:
            begun = time.time()
            yield TURN
            self.until += time.time() - begun


class Rates:
    """Seconds a token of prompt and of generation, as seen so far: what a larger test will take at least."""

    def __init__(self) -> None:
        self.prompt, self.step = 0.0, 0.0

    def seconds(self, test: Test) -> float:
        return self.prompt * test.batch * test.prompt + self.step * test.new

    def learn(self, test: Test, first: float, steps: float) -> None:
        if test.prompt >= 32:
            self.prompt = first / (test.batch * test.prompt)
        if test.new > 1:
            self.step = steps / (test.new - 1)


def measure(engine: Engine, test: Test, repeats: int, vocab: int, meters: Meters, rate: Rates, clock: Clock) -> Generator[Row, None, Row]:
    """Yields TURNs and returns the figures of one test over `repeats` requests, fewer where time runs out, after one that warms up: a
    short one where nothing is compiled.
    """
    ids = random_ids(test.batch, test.prompt, vocab, meters.device)
    if engine.compiles:
        engine.run(ids, test.new)
    else:
        engine.run(ids[:, :64], min(test.new, 2))
    meters.start()
    firsts, speeds, windows, energy = [], [], [], []
    for number in range(repeats):
        if number >= LEAST and rate.seconds(test) > clock.left:
            break
        yield from clock.turn()
        meters.wait()
        joules, begun = meters.joules(), time.perf_counter()
        moments = engine.run(ids, test.new)
        meters.wait()
        spent = meters.joules()
        if len(moments) != test.new:
            raise RuntimeError(f"{len(moments)} tokens came where {test.new} were asked for")
        first, steps = moments[0] - begun, moments[-1] - moments[0]
        rate.learn(test, first, steps)
        firsts.append(first)
        ends = moments[::WINDOW]
        windows += [(b - a) / WINDOW for a, b in itertools.pairwise(ends)]
        made = test.batch * (test.new - 1) if test.new > 1 else test.batch * test.prompt
        speeds.append(made / (steps if test.new > 1 else first))
        if joules is not None and spent is not None:
            energy.append((spent - joules) / made)
    figures: Row = {
        "tokens_per_second": statistics.mean(speeds),
        "deviation": statistics.stdev(speeds) if len(speeds) > 1 else None,
        "repeats": len(speeds),
        "ttft_ms": 1e3 * statistics.median(firsts),
        **meters.memory(),
    }
    if windows:
        ordered = sorted(windows)
        figures |= {f"tpot_p{p}_ms": 1e3 * ordered[round(p / 100 * (len(ordered) - 1))] for p in (50, 90, 99)}
    if energy:
        figures["joules_per_token"] = statistics.mean(energy)
    return figures


ENGINES = (OURS, TRANSFORMERS, STATIC)
