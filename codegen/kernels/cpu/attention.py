"""Flash attention with queries in lanes: keys and values are broadcast where they lie.

    for batch, head, tile of queries (parallel):
      for block of keys:
        scores[key, queries] = K[key, :] . Q[:, queries] + mask     # log2 domain
        running maximum; weights = exp2(scores - maximum)           # lane by lane
        out[:, queries] = out * exp2(old - new maximum) + V[key, :] weights[key, queries]
      out / sum of weights

No transposition is needed: in lanes, feature d of 16 neighbouring tokens is one vector, so Q is
ready, and a key's or value's feature is one scalar away from the next. Sequences of a batch follow
each other without padding, so a tile need not begin at a lane group: then queries are gathered and
results scattered lane by lane.

Source: Dao et al., "FlashAttention", 2022; Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.attention_mask import MaskShape
from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, exp2
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Registers,
    Tensor,
    arguments,
    bind,
    choose,
    load,
    prim_func,
    splat,
    store,
    symbol,
)
from sparsify.layouts import LANES

_KEY_BLOCK = 64
_IN_REGISTERS = 8
"""Keys (or features of the output) whose accumulators are held in registers together."""

_LOWEST = -3e38
"""Below every score, masked or not, but for bool masks' minus infinity."""


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
        scale = f"{self.scale:.9g}".replace(".", "d").replace("-", "m").replace("+", "")
        return (
            f"attention_{self.isa.name}_h{self.heads}_{self.kv_heads}_{self.head_dim}_{features}"
            f"_s{scale}_{'causal' if self.causal else 'full'}_mask_{mask}_v{self.vectors}"
        )

    @property
    def tile(self) -> int:
        """Queries of a tile."""
        return self.vectors * self.isa.vector

    def build(self) -> Any:
        """A PrimFunc ``(query, key, value[, mask], batch, queries, keys, y)``.

        The mask is what `AttentionMask` makes.
        """
        return _Emitter(self).build()


class _Emitter:
    def __init__(self, spec: Attention) -> None:
        self.spec = spec
        self.width = spec.isa.vector

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            query_groups, key_groups, value_groups = symbol(), symbol(), symbol()
            mask_extents = (symbol(), symbol(), symbol(), symbol())
            self.query_groups = query_groups
            self.query, self.key, self.value, self.mask, *extents, self.y = arguments(
                Tensor("query", (query_groups, spec.features[0], LANES)),
                Tensor("key", (key_groups, spec.features[1], LANES)),
                Tensor("value", (value_groups, spec.features[2], LANES)),
                Tensor("mask", mask_extents) if spec.mask else None,
                Integer("batch"),
                Integer("queries"),
                Integer("keys"),
                Tensor("y", (query_groups, spec.heads * spec.head_dim, LANES)),
            )
            self.mask_extents = mask_extents
            batch, queries, keys = extents
            self.queries, self.keys = queries, keys
            # At least one: TVM's analyser would try a division by zero tiles.
            tiles = bind(T.max(T.floordiv(queries + (spec.tile - 1), spec.tile), T.int64(1)))
            with T.parallel(batch * spec.heads * tiles) as task:
                row, tile = bind(T.floordiv(task, tiles)), bind(T.floormod(task, tiles))
                sequence = bind(T.floordiv(row, spec.heads))
                head = bind(T.floormod(row, spec.heads))
                self._tile(sequence, head, bind(tile * spec.tile))
        return result[0]

    def _tile(self, sequence: Expr, head: Expr, first: Expr) -> None:
        spec, vectors = self.spec, self.spec.vectors
        kv_head = bind(T.floordiv(head * spec.kv_heads, spec.heads))
        self.first = first
        self.token = bind(sequence * self.queries + first)
        self.group = bind(T.floordiv(self.token, LANES))
        self.misplaced = bind(self.token - self.group * LANES)
        self.key_token = bind(sequence * self.keys)
        self.key_feature = bind((spec.offsets[1] + kv_head * spec.head_dim) * LANES)
        self.value_feature = bind((spec.offsets[2] + kv_head * spec.head_dim) * LANES)
        if spec.mask:
            self.mask_at = bind(spec.mask.offset(sequence, head, self.mask_extents))
        self.q = T.alloc_buffer((spec.head_dim * spec.tile,), "float32", scope="local")
        self.out = T.alloc_buffer((spec.head_dim * spec.tile,), "float32", scope="local")
        self.weights = T.alloc_buffer((_KEY_BLOCK * spec.tile,), "float32", scope="local")
        self.places = T.alloc_buffer((_KEY_BLOCK,), "int64", scope="global")
        self.maximum, self.sum = Registers(vectors, self.width), Registers(vectors, self.width)
        self._gather_queries(head)
        with T.serial(T.int64(spec.head_dim)) as d:
            for v in range(vectors):
                store(self.out, self._cell(d, v), splat(0.0, self.width), self.width)
        for v in range(vectors):
            self.maximum[v] = splat(_LOWEST, self.width)
            self.sum[v] = splat(0.0, self.width)
        visible = self.keys
        if spec.causal:
            visible = bind(T.min(visible, first + spec.tile))
        with T.serial(T.floordiv(visible + (_KEY_BLOCK - 1), _KEY_BLOCK)) as block:
            begin = bind(block * _KEY_BLOCK)
            self._key_block(begin, bind(T.min(T.int64(_KEY_BLOCK), self.keys - begin)))
        self._scatter_results(head)

    def _cell(self, row: Expr, vector: int) -> Expr:
        return row * self.spec.tile + vector * self.width

    def _place(self, token: Expr, features: int) -> Expr:
        """Offset of feature 0 of a token in ``[groups, features, 16]``."""
        return T.floordiv(token, LANES) * (features * LANES) + T.floormod(token, LANES)

    def _group_place(self, vector: int, features: int) -> Expr:
        """Offset of feature 0 of a vector of a tile that begins at a lane group."""
        group, part = divmod(vector * self.width, LANES)
        # The last tile may reach past the last lane group; its lanes there are unused.
        inside = T.min(self.group + group, self.query_groups - 1)
        return inside * (features * LANES) + part

    def _gather_queries(self, head: Expr) -> None:
        spec = self.spec
        feature = bind((spec.offsets[0] + head * spec.head_dim) * LANES)
        factor = spec.scale * LOG2E

        def aligned() -> None:
            for v in range(spec.vectors):
                at = bind(self._group_place(v, spec.features[0]) + feature)
                with T.serial(T.int64(spec.head_dim)) as d:
                    value = load(self.query, at + d * LANES, self.width)
                    store(self.q, self._cell(d, v), value * splat(factor, self.width), self.width)

        def gathered() -> None:
            last = bind(self.token - self.first + self.queries - 1)
            with T.serial(T.int64(spec.tile)) as lane:
                token = T.min(self.token + lane, last)
                at = bind(self._place(token, spec.features[0]) + feature)
                with T.serial(T.int64(spec.head_dim)) as d:
                    value = self.query[at + d * LANES] * T.float32(factor)
                    store(self.q, d * spec.tile + lane, value, 1)

        choose(True, self.misplaced == 0, aligned, gathered)

    def _scatter_results(self, head: Expr) -> None:
        spec = self.spec
        features = spec.heads * spec.head_dim
        feature = bind(head * (spec.head_dim * LANES))
        scale = [self._inverse(self.sum[v]) for v in range(spec.vectors)]
        whole = T.And(self.misplaced == 0, self.first + spec.tile <= self.queries)

        def aligned() -> None:
            for v in range(spec.vectors):
                at = bind(self._group_place(v, features) + feature)
                with T.serial(T.int64(spec.head_dim)) as d:
                    value = load(self.out, self._cell(d, v), self.width) * scale[v]
                    store(self.y, at + d * LANES, value, self.width)

        def scattered() -> None:
            with T.serial(T.int64(spec.head_dim)) as d:
                for v in range(spec.vectors):
                    value = load(self.out, self._cell(d, v), self.width) * scale[v]
                    store(self.out, self._cell(d, v), value, self.width)
            with T.serial(T.min(T.int64(spec.tile), self.queries - self.first)) as lane:
                at = bind(self._place(self.token + lane, features) + feature)
                with T.serial(T.int64(spec.head_dim)) as d:
                    store(self.y, at + d * LANES, self.out[d * spec.tile + lane], 1)

        choose(True, whole, aligned, scattered)

    def _inverse(self, total: Expr) -> Expr:
        """1 / total, and 0 for a query that sees no key, as PyTorch has it."""
        seen = total > splat(1e-30, self.width)
        inverse = splat(1.0, self.width) / total
        return bind(T.Select(seen, inverse, splat(0.0, self.width)))

    def _key_block(self, begin: Expr, count: Expr) -> None:
        vectors, width = self.spec.vectors, self.width
        new = Registers(vectors, width)
        for v in range(vectors):
            new[v] = self.maximum[v]
        with T.serial(T.floordiv(count + (_IN_REGISTERS - 1), _IN_REGISTERS)) as group:
            self._scores(begin, count, bind(group * _IN_REGISTERS), new)
        rescale = []
        for v in range(vectors):
            shift = (Vector(self.maximum[v], width) - Vector(new[v], width)).value
            rescale.append(exp2(Vector(shift, width)).value)
            self.maximum[v] = new[v]
            self.sum[v] = self.sum[v] * rescale[v]
        with T.serial(count) as key:
            token = begin + key + self.key_token
            place = self._place(token, self.spec.features[2]) + self.value_feature
            store(self.places, key, place, 1)
            for v in range(vectors):
                score = Vector(load(self.weights, self._cell(key, v), width), width)
                weight = exp2(score - Vector(self.maximum[v], width)).value
                store(self.weights, self._cell(key, v), weight, width)
                self.sum[v] = self.sum[v] + weight
        self._each_feature_group(lambda at, size: self._accumulate(at, size, count, rescale))

    def _scores(self, begin: Expr, count: Expr, offset: Expr, new: Registers) -> None:
        spec, vectors, width = self.spec, self.spec.vectors, self.width
        # Keys past the end repeat the last one: the maximum stands, and their rows are not read.
        keys = [bind(begin + T.min(offset + r, count - 1)) for r in range(_IN_REGISTERS)]
        at = [
            bind(self._place(self.key_token + key, spec.features[1]) + self.key_feature)
            for key in keys
        ]
        total = Registers(_IN_REGISTERS * vectors, width)
        for i in range(len(total)):
            total[i] = splat(0.0, width)
        with T.serial(T.int64(spec.head_dim)) as d:
            q = [bind(load(self.q, self._cell(d, v), width)) for v in range(vectors)]
            for r in range(_IN_REGISTERS):
                k = bind(splat(self.key[at[r] + d * LANES], width))
                for v in range(vectors):
                    total[r * vectors + v] = total[r * vectors + v] + k * q[v]
        for r in range(_IN_REGISTERS):
            for v in range(vectors):
                score = bind(self._masked(total[r * vectors + v], keys[r], v))
                new[v] = T.max(new[v], score)
                store(self.weights, self._cell(offset + r, v), score, width)

    def _masked(self, score: Expr, key: Expr, vector: int) -> Expr:
        spec, width = self.spec, self.width
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

    def _each_feature_group(self, body: Callable[[Expr, int], None]) -> None:
        whole, rest = divmod(self.spec.head_dim, _IN_REGISTERS)
        if whole:
            with T.serial(T.int64(whole)) as group:
                body(bind(group * _IN_REGISTERS), _IN_REGISTERS)
        if rest:
            body(T.int64(whole * _IN_REGISTERS), rest)

    def _accumulate(self, first: Expr, size: int, count: Expr, rescale: list[Expr]) -> None:
        vectors, width = self.spec.vectors, self.width
        total = Registers(size * vectors, width)
        for r in range(size):
            for v in range(vectors):
                old = load(self.out, self._cell(first + r, v), width)
                total[r * vectors + v] = old * rescale[v]
        with T.serial(count) as key:
            place = bind(self.places[key] + first * LANES)
            weight = [bind(load(self.weights, self._cell(key, v), width)) for v in range(vectors)]
            for r in range(size):
                value = bind(splat(self.value[place + r * LANES], width))
                for v in range(vectors):
                    total[r * vectors + v] = total[r * vectors + v] + value * weight[v]
        for r in range(size):
            for v in range(vectors):
                store(self.out, self._cell(first + r, v), total[r * vectors + v], width)
