"""The mix of formats by tensor, against what llama.cpp's quantizer writes."""

from __future__ import annotations

import collections

import pytest
from granite_kernels.model.checkpoint.layout import expected_tensors
from granite_kernels.model.config import GraniteConfig

from granite_kernels.errors import GraniteError
from granite_kernels.formats.mix import DENSE, QUANTIZATIONS, format_of, more_bits

# of llama-quantize's files, as load logs print them; all F32 tensors are norms and routers
HISTOGRAMS = {
    "3.1-2b": {"q4_k": 240, "q6_k": 41, DENSE: 81},
    "3.1-8b": {"q4_k": 240, "q6_k": 41, DENSE: 81},
    "3.1-1b-a400m": {"q4_k": 144, "q6_k": 25, DENSE: 73},
    "3.1-3b-a800m": {"q4_k": 192, "q6_k": 33, DENSE: 97},
}


@pytest.mark.parametrize("preset", HISTOGRAMS)
def test_the_tensors_of_a_q4_k_m_file_have_the_types_that_llama_cpp_gives_them(preset: str) -> None:
    config = GraniteConfig.preset(preset)
    counts = collections.Counter(
        format_of("q4_k_m", name, expected.shape[-1], layers=config.num_hidden_layers, tied=True)
        for name, expected in expected_tensors(config, split=True).items()
    )
    assert counts == HISTOGRAMS[preset]


def test_more_bits_go_to_both_ends_and_every_third_layer_between() -> None:
    assert [layer for layer in range(24) if more_bits(layer, 24)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert [layer for layer in range(8, 40) if more_bits(layer, 40)] == [10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39]


def test_an_untied_embedding_is_no_head() -> None:
    def of(name: str, quantization: str) -> str:
        return format_of(quantization, name, 2048, layers=40, tied=False)

    assert (of("model.embed_tokens.weight", "q4_k_m"), of("lm_head.weight", "q4_k_m")) == ("q4_k", "q6_k")
    assert (of("model.embed_tokens.weight", "int4"), of("lm_head.weight", "int4")) == ("int8", "int8")


@pytest.mark.parametrize(
    ("quantization", "columns", "expected"),
    [("q4_k_m", 576, "q5_0"), ("q6_k", 576, "q8_0"), ("int4", 576, "int4_g64"), ("int4", 96, "int4_g32"), ("int8", 100, DENSE)],
)
def test_columns_that_no_block_divides_take_a_narrower_one(quantization: str, columns: int, expected: str) -> None:
    assert format_of(quantization, "model.layers.3.self_attn.q_proj.weight", columns, layers=30, tied=True) == expected


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_norms_stay_dense(name: str, quantization: str) -> None:
    assert format_of(quantization, name, 2048, layers=40, tied=True) == DENSE


def test_an_unknown_quantization_is_refused_with_those_there_are() -> None:
    with pytest.raises(GraniteError, match="quantization is 'q9', expected one of int8, int4, q8_0, q6_k, q4_k_m"):
        format_of("q9", "lm_head.weight", 2048, layers=40, tied=True)
