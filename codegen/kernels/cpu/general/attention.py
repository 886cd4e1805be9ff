"""Attention with any number of heads of any size; see `sparsify.codegen.kernels.cpu.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.band import Reach, Visit
from sparsify.codegen.kernels.cpu.block_lists import BlockLists, each_block
from sparsify.codegen.kernels.cpu.flash import FlashTiles
from sparsify.codegen.kernels.cpu.query_tiles import place_in_lanes
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Number,
    Tensor,
    arguments,
    bind,
    load,
    prim_func,
    splat,
    symbol,
)
from sparsify.layouts import LANES

Mask = Literal["none", "keys", "queries"]
"""What a mask varies over besides sequences and heads: the keys alone, or the queries too."""


@dataclass(frozen=True)
class GeneralAttention:
    """The kernel's specification: ``vectors`` is the query tile, ``listed`` reads block lists."""

    isa: Isa
    mask: Mask
    vectors: int
    listed: bool = False

    @property
    def name(self) -> str:
        listed = "_listed" if self.listed else ""
        return f"general_attention_{self.isa.name}_mask_{self.mask}_v{self.vectors}{listed}"

    def build(self) -> Any:
        """A PrimFunc ``(query, key, value[, mask, batch_step, head_step][, counts, indices,
        full_counts, full_indices, query_block, key_block], batch, queries, keys, reach, window,
        sinks, heads, kv_heads, head_dim, query_offset, key_offset, value_offset, scale, softcap,
        y)``.

        Activations are in lanes, ``[groups, features, 16]``. The mask is what `AttentionMask`
        makes, ``[planes, keys, padded queries or 1]``; a sequence's plane lies ``batch_step``
        floats after the one before, a head's ``head_step``. Lists are a `BlockMask`'s. Query ``i``
        sees key ``j`` only if ``j <= i + reach``: 0 is causal, the number of keys hides none; and
        only if ``|i - j| < window`` or ``j < sinks``. A softcap of 0 is none.
        """
        return _Emitter(self).build()


class _Emitter(FlashTiles):
    def __init__(self, spec: GeneralAttention) -> None:
        super().__init__(spec.isa, (1, 1, 1), spec.vectors, 0, 0, Scores(1.0, 0, 0.0), LANES)
        self.spec = spec

    def build(self) -> Any:
        masked = self.spec.mask != "none"
        listed = self.spec.listed
        self.lists = BlockLists("block_attention") if listed else None
        with prim_func(self.spec.name) as result:
            self.groups, key_groups, value_groups = symbol(), symbol(), symbol()
            query_features, self.key_features, self.value_features = symbol(), symbol(), symbol()
            planes, mask_keys, self.padded = symbol(), symbol(), symbol()
            names = ("batch", "queries", "keys", "reach", "window", "sinks")
            heads_names = ("heads", "kv_heads", "head_dim")
            offsets = ("query_offset", "key_offset", "value_offset")
            self.query, self.key, self.value, self.mask, *rest = arguments(
                Tensor("query", (self.groups, query_features, LANES)),
                Tensor("key", (key_groups, self.key_features, LANES)),
                Tensor("value", (value_groups, self.value_features, LANES)),
                Tensor("mask", (planes, mask_keys, self.padded)) if masked else None,
                Integer("batch_step") if masked else None,
                Integer("head_step") if masked else None,
                *(self.lists.tensors if self.lists else (None,) * 4),
                Integer("query_block") if listed else None,
                Integer("key_block") if listed else None,
                *(Integer(name) for name in (*names, *heads_names, *offsets)),
                Number("scale"),
                Number("softcap"),
                Tensor("y", (self.groups, symbol(), LANES)),
            )
            self.batch_step, self.head_step, *rest = rest
            lists, block, rest = rest[:4], rest[4:6], rest[6:]
            batch, self.queries, self.keys, reach, window, sinks, *rest = rest
            heads, kv_heads, head_dim, offset, self.key_offset, self.value_offset, *rest = rest
            scale, softcap, self.y = rest
            # At least one: TVM's analyser would try a division by zero heads.
            heads = bind(T.max(heads, T.int64(1)))
            self.reach = Reach(reach, window, sinks)
            self.scores = Scores(scale, 0, softcap)
            factor = bind(self.scores.factor)
            self.set_sizes((heads, kv_heads, head_dim), query_features, offset, factor)
            if self.lists:
                # At least one token, likewise.
                query_block, key_block = (bind(T.max(size, T.int64(1))) for size in block)
                sizes = (query_block, key_block)
                self.lists.bind(lists, sizes, (batch, heads), (self.queries, self.keys))
            self.emit(batch)
        return result[0]

    def each_block(self, sequence: Expr, head: Expr, kv_head: Expr, visit: Visit) -> None:
        self.key_token = bind(sequence * self.keys)
        self.key_feature = bind((self.key_offset + kv_head * self.head_dim) * LANES)
        self.value_feature = bind((self.value_offset + kv_head * self.head_dim) * LANES)
        if self.mask is not None:
            self.mask_at = bind(sequence * self.batch_step + head * self.head_step)
        tile = (self.first, self.first + (self.tile - 1))
        each_block(
            self.reach, self.lists, self.mask is not None, (sequence, head), tile, self.keys, visit
        )

    def key_place(self, key: Expr) -> Expr:
        return place_in_lanes(self.key_token + key, self.key_features) + self.key_feature

    def value_place(self, key: Expr) -> Expr:
        return place_in_lanes(self.key_token + key, self.value_features) + self.value_feature

    def seen(self, score: Expr, key: Expr, vector: int) -> Expr:
        first = self.first + vector * self.width
        if self.spec.mask == "queries":
            score = score + load(self.mask, self.mask_at + key * self.padded + first, self.width)
        elif self.spec.mask == "keys":
            score = score + splat(self.mask[self.mask_at + key], self.width)
        return self.reach.score(score, key, first, self.width)
