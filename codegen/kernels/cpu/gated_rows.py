"""Gated linear for few tokens: only the rows whose gate is not zero in all tokens are computed.

list the outputs whose gate is not zero in all tokens
for run of the list (parallel):               # threads share the active outputs evenly
  zeros to the run's outputs
  for R rows of the list, token tile:         # R x tokens accumulators in registers
    for 16 columns: acc[r, :] += w[r, columns] * x[:, columns]
    y[:, r] = gate[:, r] * (sum over lanes + bias)

The end of a row fetches the beginning of the row that is active next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.active_set import ActiveSet
from sparsify.codegen.kernels.cpu.dense_rows import DenseRowTiles
from sparsify.codegen.kernels.cpu.rows import lane_sums, row_share, token_tiles
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    along,
    arguments,
    bind,
    prefetch,
    prim_func,
    splat,
    store,
    symbol,
)
from sparsify.layouts import Dense

_STEP = 16
"""Columns of a step: a cache line of each row."""

_AHEAD = 512
"""Floats of each row between a prefetch and its use."""


@dataclass(frozen=True)
class GatedRowsLinear:
    """The kernel's specification.

    Attributes:
        rows: active rows that share a load of activations, a power of two.
        tokens: widest token tile, a power of two.
    """

    isa: Isa
    out_features: int
    in_features: int
    layout: Dense
    bias: bool
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        return (
            f"gated_rows_{self.isa.name}_{self.out_features}x{self.in_features}_r{self.rows}"
            f"_t{self.tokens}{'_bias' * self.bias}"
        )

    def build(self) -> Any:
        """A PrimFunc ``(x, gate, weight[, bias], y)``."""
        return _Emitter(self).build()


class _Emitter(DenseRowTiles):
    in_features: int

    def __init__(self, spec: GatedRowsLinear) -> None:
        self.spec, self.isa, self.unit = spec, spec.isa, spec.rows
        self.in_features = spec.in_features

    def build(self) -> Any:
        spec = self.spec
        with prim_func(spec.name) as result:
            self.tokens = symbol()
            self.x, self.gate, self.matrix, self.bias, self.y = arguments(
                Tensor("x", (self.tokens, spec.in_features)),
                Tensor("gate", (self.tokens, spec.out_features)),
                Tensor("weight", (spec.out_features, spec.in_features)),
                Tensor("bias", (spec.out_features,)) if spec.bias else None,
                Tensor("y", (self.tokens, spec.out_features)),
            )
            self.active = ActiveSet(
                spec.isa, self.gate, self.tokens, spec.out_features, known=True, spare=1
            )
            count, (tasks, _) = self.active.count, row_share(spec.out_features, spec.rows)
            with T.parallel(T.int64(tasks)) as task:
                self._run(*(bind(T.floordiv(count * (task + i), tasks)) for i in range(2)), task)
        return result[0]

    def _run(self, begin: Expr, end: Expr, task: Expr) -> None:
        """The entries of the list from ``begin``, and the outputs up to those of ``end``."""
        spec, count = self.spec, self.active.count
        outputs = T.int64(spec.out_features)
        first = bind(T.if_then_else(task == 0, T.int64(0), self._output(begin)))
        last = bind(self._output(end))
        width = spec.isa.vector
        with T.serial(self.tokens) as token:
            at = bind(token * outputs + first)
            along(
                bind(last - first),
                width,
                lambda o, wide: store(self.y, at + o, splat(0.0, wide), wide),
            )
        groups = bind(T.floordiv(end - begin + (spec.rows - 1), spec.rows))
        with T.serial(groups) as group:
            place = bind(begin + group * spec.rows)
            # A group that is not full repeats the run's last row.
            rows = [bind(self.active[T.min(place + r, end - 1)]) for r in range(spec.rows)]
            later = [
                bind(self.active[T.min(place + (spec.rows + r), count - 1)])
                for r in range(spec.rows)
            ]
            token_tiles(
                self.tokens,
                spec.tokens,
                lambda token, tile: self._group(rows, later, token, tile),
            )

    def _output(self, place: Expr) -> Expr:
        """The output of an entry; behind the last, the number of outputs."""
        inside = place < self.active.count
        return T.if_then_else(inside, self.active[place], T.int64(self.spec.out_features))

    def _group(self, rows: list[Expr], later: list[Expr], token: Expr, count: int) -> None:
        """As many of the rows at once as have registers for ``count`` tokens."""
        together = max(1, min(len(rows), self.isa.registers // 2 // count))
        for r in range(0, len(rows), together):
            self._tile(rows[r : r + together], later[r : r + together], token, count)

    def _tile(self, rows: list[Expr], later: list[Expr], token: Expr, count: int) -> None:
        spec, width, features = self.spec, self.isa.vector, self.in_features
        w_at, next_at = ([bind(row * features) for row in some] for some in (rows, later))
        x_at = [bind((token + t) * features) for t in range(count)]
        total = Registers(len(rows) * count, width)
        total.clear()
        whole = features // _STEP
        own = max(0, whole - _AHEAD // _STEP)
        for begin, steps, ahead, shift in (
            (0, own, w_at, _AHEAD),
            (own, whole - own, next_at, -own * _STEP),
        ):
            if not steps:
                continue
            with T.serial(T.int64(steps)) as step:
                column = bind((begin + step) * _STEP)
                for at in ahead:
                    prefetch(self.matrix, at + column + shift, near=False)
                self._step(total, [at + column for at in w_at], [at + column for at in x_at], _STEP)
        if left := features % _STEP:
            at = features - left
            self._step(total, [w + at for w in w_at], [x + at for x in x_at], left)
        for t in range(count):
            sums = lane_sums([total[r * count + t] for r in range(len(rows))], width)
            for r, row in enumerate(rows):
                at = bind((token + t) * spec.out_features + row)
                lanes = min(width, len(rows))
                value = sums[r // lanes]
                value = T.Shuffle([value], [r % lanes]) if lanes > 1 else value
                if self.bias is not None:
                    value = value + self.bias[row]
                store(self.y, at, self.gate[at] * value, 1)
