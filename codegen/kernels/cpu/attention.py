"""Attention over keys and values in lanes: ``softmax(q k^T * scale + mask) v`` for each head.

Which keys are read follows from positions (`Band`), or from lists of blocks: the four tensors of a
`BlockMask`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.band import Band
from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.attention_mask import MaskShape
from sparsify.codegen.kernels.cpu.band import Reach, Visit
from sparsify.codegen.kernels.cpu.block_lists import BlockLists, each_block
from sparsify.codegen.kernels.cpu.flash import FlashTiles
from sparsify.codegen.kernels.cpu.query_tiles import place_in_lanes
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Tensor,
    arguments,
    bind,
    in_name,
    prim_func,
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
        scores: how they are made of products, and the window.
        causal, sinks: see `Band`.
        mask: which dimensions of the mask vary, None without a mask.
        vectors: query tile, in vectors.
        block: queries and keys of a listed block, None without lists; whole tiles, and multiples of
            16 keys.
        skip: see `FlashTiles`.
    """

    isa: Isa
    heads: int
    kv_heads: int
    head_dim: int
    features: tuple[int, int, int]
    offsets: tuple[int, int, int]
    scores: Scores
    causal: bool
    sinks: int
    mask: MaskShape | None
    vectors: int
    block: tuple[int, int] | None = None
    skip: float = 0.0

    @property
    def name(self) -> str:
        mask = self.mask.name if self.mask else "none"
        features = "_".join(f"{f}p{o}" for f, o in zip(self.features, self.offsets, strict=True))
        seen = f"{'causal' if self.causal else 'full'}_{self.sinks}"
        block = f"_b{self.block[0]}_{self.block[1]}_{in_name(self.skip)}" if self.block else ""
        return (
            f"attention_{self.isa.name}_h{self.heads}_{self.kv_heads}_{self.head_dim}_{features}"
            f"_{self.scores.name}_{seen}_mask_{mask}_v{self.vectors}{block}"
        )

    def build(self) -> Any:
        """A PrimFunc ``(query, key, value[, mask][, counts, indices, full_counts, full_indices],
        batch, queries, keys, y)``.

        The mask is what `AttentionMask` makes. Lists are checked as they are read.
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
            spec.scores,
            LANES,
            spec.skip,
        )
        self.spec = spec
        self.reach = Reach.of(Band(spec.causal, spec.scores.window, spec.sinks))
        self.lists = BlockLists("block_attention") if spec.block else None

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            self.groups, key_groups, value_groups = symbol(), symbol(), symbol()
            self.mask_extents = (symbol(), symbol(), symbol(), symbol())
            self.query, self.key, self.value, self.mask, *lists = arguments(
                Tensor("query", (self.groups, spec.features[0], LANES)),
                Tensor("key", (key_groups, spec.features[1], LANES)),
                Tensor("value", (value_groups, spec.features[2], LANES)),
                Tensor("mask", self.mask_extents) if spec.mask else None,
                *(self.lists.tensors if self.lists else ()),
                Integer("batch"),
                Integer("queries"),
                Integer("keys"),
                Tensor("y", (self.groups, spec.heads * spec.head_dim, LANES)),
            )
            *lists, batch, self.queries, self.keys, self.y = lists
            if self.lists and spec.block:
                of = (batch, T.int64(spec.heads))
                self.lists.bind(lists, spec.block, of, (self.queries, self.keys))
            self.emit(batch)
        return result[0]

    def each_block(self, sequence: Expr, head: Expr, kv_head: Expr, visit: Visit) -> None:
        spec = self.spec
        self.key_token = bind(sequence * self.keys)
        self.key_feature = bind((spec.offsets[1] + kv_head * spec.head_dim) * LANES)
        self.value_feature = bind((spec.offsets[2] + kv_head * spec.head_dim) * LANES)
        if spec.mask:
            self.mask_at = bind(spec.mask.offset(sequence, head, self.mask_extents))
        tile = (self.first, bind(self.first + (self.tile - 1)))
        masked = spec.mask is not None
        each_block(self.reach, self.lists, masked, (sequence, head), tile, self.keys, visit)

    def key_place(self, key: Expr) -> Expr:
        token = self.key_token + key
        return place_in_lanes(token, self.spec.features[1]) + self.key_feature

    def value_place(self, key: Expr) -> Expr:
        token = self.key_token + key
        return place_in_lanes(token, self.spec.features[2]) + self.value_feature

    def seen(self, score: Expr, key: Expr, vector: int) -> Expr:
        spec, width = self.spec, self.width
        first = self.first + vector * width
        if spec.mask:
            score = score + spec.mask.value(
                self.mask, self.mask_at, key, first, self.mask_extents, width
            )
        return self.reach.score(score, key, first, width)
