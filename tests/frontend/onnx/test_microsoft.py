"""The operators that ONNX Runtime adds, against ONNX Runtime on random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontend.onnx.one_node import MICROSOFT, Array, compare, ints, number, rand

PLAIN = [
    ("Gelu", {}, [rand(3, 5)]),
    ("BiasGelu", {}, [rand(3, 5), rand(5)]),
    ("FastGelu", {}, [rand(3, 5), rand(5)]),
    ("QuickGelu", {}, [rand(3, 5)]),
    ("FusedMatMul", {"alpha": 0.5, "transA": 1}, [rand(4, 3), rand(4, 5)]),
    ("FusedMatMul", {"transB": 1}, [rand(2, 3, 4), rand(2, 5, 4)]),
    ("FusedMatMul", {"transBatchA": 1}, [rand(3, 2, 4), rand(2, 4, 5)]),
    ("FusedGemm", {"activation": "Relu", "transB": 1}, [rand(3, 4), rand(5, 4), rand(5)]),
    ("FusedConv", {"activation": "Relu"}, [rand(1, 3, 6, 7), rand(4, 3, 3, 2), rand(4)]),
    (
        "SkipLayerNormalization",
        {"epsilon": 1e-5},
        [rand(2, 3, 8, seed=1), rand(2, 3, 8), *[rand(8)] * 3],
    ),
    ("SkipSimplifiedLayerNormalization", {}, [rand(2, 3, 8, seed=1), rand(2, 3, 8), rand(8)]),
]


@pytest.mark.parametrize(("operator", "attributes", "inputs"), PLAIN)
@pytest.mark.parametrize("constant", [False, True])
def test_fused(
    tmp_path: Path,
    operator: str,
    attributes: dict[str, Any],
    inputs: list[Array],
    constant: bool,
) -> None:
    constants = tuple(range(1, len(inputs))) if constant else ()
    # ONNX Runtime's FastGelu takes a polynomial for tanh.
    options: dict[str, Any] = {"domain": MICROSOFT, "constants": constants, "tolerance": 1e-4}
    compare(tmp_path, operator, inputs, attributes, **options)


def test_simplified_layer_normalisation(tmp_path: Path) -> None:
    compare(tmp_path, "SimplifiedLayerNormalization", [rand(2, 3, 8), rand(8)], {"axis": -1})


def test_embeddings(tmp_path: Path) -> None:
    ids, kinds = ints(0, 9, 2, 5, dtype=np.int32), ints(0, 2, 2, 5, dtype=np.int32)
    tables = [rand(9, 8), rand(6, 8), rand(2, 8), rand(8), rand(8)]
    inputs = [ids, kinds, *tables, np.array([[1, 1, 1, 0, 0], [1] * 5], np.int32)]
    compare(
        tmp_path,
        "EmbedLayerNormalization",
        inputs,
        {"epsilon": 1e-5},
        domain=MICROSOFT,
        outputs=2,
        constants=(2, 3, 4, 5, 6),
    )


MASKS = {
    "none": None,
    "lengths": np.array([3, 5], np.int32),
    "keys": np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], np.int32),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(tmp_path: Path, mask: str, causal: int) -> None:
    inputs = [rand(2, 5, 12), rand(12, 36), rand(36), MASKS[mask]]
    attributes = {"num_heads": 3, "unidirectional": causal, "scale": 0.0}  # 0 is the default scale
    options: dict[str, Any] = {"domain": MICROSOFT, "tolerance": 1e-4, "constants": (1, 2)}
    compare(tmp_path, "Attention", inputs, attributes, **options)


@pytest.mark.parametrize("past", [False, True])
def test_multi_head_attention(tmp_path: Path, past: bool) -> None:
    inputs = [rand(2, 5, 12), rand(2, 5, 12, seed=1), rand(2, 5, 12, seed=2), rand(36), None, None]
    if past:
        inputs += [rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1)]
    options: dict[str, Any] = {"domain": MICROSOFT, "tolerance": 1e-4, "constants": (3,)}
    outputs = 3 if past else 1
    compare(tmp_path, "MultiHeadAttention", inputs, {"num_heads": 3}, outputs=outputs, **options)


@pytest.mark.parametrize("rotary", [0, 1])
@pytest.mark.parametrize("new", [1, 6])
def test_group_query_attention(tmp_path: Path, rotary: int, new: int) -> None:
    """A prompt of 6 tokens, or one token after 5."""
    heads, kv_heads, size = 4, 2, 16
    past = 0 if new > 1 else 5
    angles = np.outer(np.arange(12), 10 ** -np.arange(0, 2, 2 / (size // 2))).astype(np.float32)
    inputs: list[Array | None] = [
        rand(2, new, heads * size),
        rand(2, new, kv_heads * size, seed=1),
        rand(2, new, kv_heads * size, seed=2),
        rand(2, kv_heads, past, size) if past else None,
        rand(2, kv_heads, past, size, seed=1) if past else None,
        np.full(2, past + new - 1, np.int32),
        number(past + new, np.int32),
        *((np.cos(angles), np.sin(angles)) if rotary else ()),
    ]
    compare(
        tmp_path,
        "GroupQueryAttention",
        inputs,
        {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": rotary},
        domain=MICROSOFT,
        outputs=3,
        constants=(6, 7, 8),
        tolerance=1e-4,
    )


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(tmp_path: Path, interleaved: int) -> None:
    angles = rand(9, 4)
    inputs = [rand(2, 3, 24), ints(0, 9, 2, 3), np.cos(angles), np.sin(angles)]
    options: dict[str, Any] = {"domain": MICROSOFT, "constants": (2, 3)}
    compare(tmp_path, "RotaryEmbedding", inputs, {"interleaved": interleaved}, **options)
