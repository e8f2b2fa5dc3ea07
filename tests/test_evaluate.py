"""lm-eval through `as_transformers()`: the same questions, the same seeds, transformers' model beside ours."""

from __future__ import annotations

from typing import Any

import pytest
from granite_kernels.bench.evaluate import LOCAL, answers, evaluate, furthest, metrics, ours, theirs, tokenizer_of
from granite_kernels.model.sources import demo_path


def test_the_distance_of_answers_sees_likelihoods_and_texts() -> None:
    assert furthest([(-1.0, True), "Paris", -2.0], [(-1.25, False), "Rome", -2.0]) == (0.25, 1)
    assert furthest([(-1.0, True), "Paris"], [(-1.0, True), "Paris"]) == (0.0, 0)


def test_metrics_are_named_by_task_and_answers_come_in_the_order_of_the_questions() -> None:
    samples = [{"doc_id": 1, "resps": [["b"]]}, {"doc_id": 0, "resps": [[(-1.0, True)], [(-2.0, False)]]}]
    found: dict[str, Any] = {"results": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "t"}}, "samples": {"t": samples}}
    assert metrics(found) == {("t", "acc"): 0.5}
    assert answers(found) == [(-1.0, True), (-2.0, False), "b"]


@pytest.mark.slow
def test_lm_eval_tells_the_same_of_transformers_model_and_of_ours() -> None:
    pytest.importorskip("lm_eval", reason="part of the eval extra, which brings some 40 packages that nothing else here needs")
    source = demo_path()
    tokenizer = tokenizer_of(source)
    found = [evaluate(model, tokenizer, LOCAL, limit=6) for model in (ours(source, device="cpu"), theirs(source, "float32"))]
    assert metrics(found[0]) == pytest.approx(metrics(found[1]))
    assert {task for task, _ in metrics(found[0])} == set(LOCAL)
    assert metrics(found[0])["granite_kernels_facts", "acc"] > 0.5  # the questions are answered, not guessed
    distance, texts = furthest(*map(answers, found))
    assert (distance < 1e-3, texts) == (True, 0)
