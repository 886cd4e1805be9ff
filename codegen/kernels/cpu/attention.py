"""Attention over keys and values in lanes: ``softmax(q k^T * scale + mask) v`` for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.attention_mask import MaskShape
from sparsify.codegen.kernels.cpu.flash import FlashTiles, place_in_lanes
from sparsify.codegen.kernels.cpu.math import LOG2E
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    arguments,
    bind,
    in_name,
    prim_func,
    splat,
    symbol,
)
from sparsify.layouts import LANES


@dataclass(frozen=True)
class Attention:
    """The kernel's specification.

    Attributes:
        heads, kv_heads, head_dim: head ``h`` attends with key head ``h * kv_heads // heads``.
        features: features of the tensors that hold query, key and value.
        offsets: where head 0 begins in each.
        mask: which dimensions of the mask vary, None without a mask.
        vectors: query tile, in vectors.
    """

    isa: Isa
    heads: int
    kv_heads: int
    head_dim: int
    features: tuple[int, int, int]
    offsets: tuple[int, int, int]
    scale: float
    causal: bool
    mask: MaskShape | None
    vectors: int

    @property
    def name(self) -> str:
        mask = self.mask.name if self.mask else "none"
        features = "_".join(f"{f}p{o}" for f, o in zip(self.features, self.offsets, strict=True))
        seen = "causal" if self.causal else "full"
        return (
            f"attention_{self.isa.name}_h{self.heads}_{self.kv_heads}_{self.head_dim}_{features}"
            f"_s{in_name(self.scale)}_{seen}_mask_{mask}_v{self.vectors}"
        )

    def build(self) -> Any:
        """A PrimFunc ``(query, key, value[, mask], batch, queries, keys, y)``.

        The mask is what `AttentionMask` makes.
        """
        return _Emitter(self).build()


class _Emitter(FlashTiles):
    def __init__(self, spec: Attention) -> None:
        super().__init__(
            spec.isa,
            (spec.heads, spec.kv_heads, spec.head_dim),
            spec.vectors,
            spec.features[0],
            spec.offsets[0],
            spec.scale * LOG2E,
            LANES,
        )
        self.spec = spec

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            self.groups, key_groups, value_groups = symbol(), symbol(), symbol()
            self.mask_extents = (symbol(), symbol(), symbol(), symbol())
            self.query, self.key, self.value, self.mask, batch, self.queries, self.keys, self.y = (
                arguments(
                    Tensor("query", (self.groups, spec.features[0], LANES)),
                    Tensor("key", (key_groups, spec.features[1], LANES)),
                    Tensor("value", (value_groups, spec.features[2], LANES)),
                    Tensor("mask", self.mask_extents) if spec.mask else None,
                    Integer("batch"),
                    Integer("queries"),
                    Integer("keys"),
                    Tensor("y", (self.groups, spec.heads * spec.head_dim, LANES)),
                )
            )
            self.emit(batch)
        return result[0]

    def keys_of_tile(self, sequence: Expr, head: Expr, kv_head: Expr) -> tuple[Expr, Expr]:
        spec = self.spec
        self.key_token = bind(sequence * self.keys)
        self.key_feature = bind((spec.offsets[1] + kv_head * spec.head_dim) * LANES)
        self.value_feature = bind((spec.offsets[2] + kv_head * spec.head_dim) * LANES)
        if spec.mask:
            self.mask_at = bind(spec.mask.offset(sequence, head, self.mask_extents))
        end = self.keys
        if spec.causal:
            end = bind(T.min(end, self.first + self.tile))
        return T.int64(0), end

    def key_place(self, key: Expr) -> Expr:
        token = self.key_token + key
        return place_in_lanes(token, self.spec.features[1]) + self.key_feature

    def value_place(self, key: Expr) -> Expr:
        token = self.key_token + key
        return place_in_lanes(token, self.spec.features[2]) + self.value_feature

    def score(self, product: Expr, key: Expr, vector: int) -> Expr:
        spec, width, score = self.spec, self.width, product
        first = self.first + vector * width
        if spec.mask:
            score = score + spec.mask.value(
                self.mask, self.mask_at, key, first, self.mask_extents, width
            )
        if spec.causal:
            lanes = T.Ramp(first, T.int64(1), width) if width > 1 else first
            hidden = T.Broadcast(key, width) > lanes if width > 1 else key > lanes
            score = T.Select(hidden, splat(T.float32(float("-inf")), width), score)
        return score
