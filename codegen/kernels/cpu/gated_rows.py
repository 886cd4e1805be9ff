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
    i64,
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


class GatedRowTiles(DenseRowTiles):
    """Emits the runs of the list of active outputs.

    Attributes:
        unit: active rows that share a load of activations.
        widest: widest token tile.
        in_features, y_features: features of a token of ``x``, and of the gate and ``y``. Sizes
            known only at run time are whole steps.
        active: the outputs whose gate is not zero.
        x, gate, matrix, bias, y: the kernel's arguments.
    """

    widest: int
    tokens: Expr
    active: ActiveSet
    gate: Expr
    bias: Expr | None

    def runs(self, tasks: Expr) -> None:
        """All outputs, in so many tasks."""
        count = self.active.count
        with T.parallel(tasks) as task:
            begin, end = (bind(T.floordiv(count * (task + i), tasks)) for i in range(2))
            self._run(begin, end, task)

    def _run(self, begin: Expr, end: Expr, task: Expr) -> None:
        """The entries of the list from ``begin``, and the outputs up to those of ``end``."""
        count, width, unit = self.active.count, self.isa.vector, self.unit
        first = bind(T.if_then_else(task == 0, T.int64(0), self._output(begin)))
        last = bind(self._output(end))
        with T.serial(self.tokens) as token:
            at = bind(token * self.y_features + first)
            along(
                bind(last - first),
                width,
                lambda o, wide: store(self.y, at + o, splat(0.0, wide), wide),
            )
        with T.serial(T.floordiv(end - begin + (unit - 1), unit)) as group:
            place = bind(begin + group * unit)
            # A group that is not full repeats the run's last row.
            rows = [bind(self.active[T.min(place + r, end - 1)]) for r in range(unit)]
            later = [bind(self.active[T.min(place + (unit + r), count - 1)]) for r in range(unit)]
            token_tiles(
                self.tokens,
                self.widest,
                lambda token, tile: self._group(rows, later, token, tile),
            )

    def _output(self, place: Expr) -> Expr:
        """The output of an entry; behind the last, the number of outputs."""
        inside = place < self.active.count
        return T.if_then_else(inside, self.active[place], i64(self.y_features))

    def _group(self, rows: list[Expr], later: list[Expr], token: Expr, count: int) -> None:
        """As many of the rows at once as have registers for ``count`` tokens."""
        together = max(1, min(len(rows), self.isa.registers // 2 // count))
        for r in range(0, len(rows), together):
            self._active(rows[r : r + together], later[r : r + together], token, count)

    def _active(self, rows: list[Expr], later: list[Expr], token: Expr, count: int) -> None:
        width, features = self.isa.vector, self.in_features
        w_at, next_at = ([bind(row * features) for row in some] for some in (rows, later))
        x_at = [bind((token + t) * features) for t in range(count)]
        total = Registers(len(rows) * count, width)
        total.clear()
        known = isinstance(features, int)
        whole = T.int64(features // _STEP) if known else bind(T.floordiv(features, _STEP))
        own = bind(T.max(T.int64(0), whole - _AHEAD // _STEP))

        def steps(begin: Expr, many: Expr, ahead: list[Expr], shift: Expr | int) -> None:
            with T.serial(many) as step:
                column = bind((begin + step) * _STEP)
                for at in ahead:
                    prefetch(self.matrix, at + column + shift, near=False)
                self._step(total, [at + column for at in w_at], [at + column for at in x_at], _STEP)

        steps(T.int64(0), own, w_at, _AHEAD)
        steps(own, whole - own, next_at, bind(own * -_STEP))
        if known and (left := features % _STEP):
            end = features - left
            self._step(total, [w + end for w in w_at], [x + end for x in x_at], left)
        lanes = min(width, len(rows))
        for t in range(count):
            sums = lane_sums([total[r * count + t] for r in range(len(rows))], width)
            for r, row in enumerate(rows):
                at = bind((token + t) * self.y_features + row)
                value = sums[r // lanes]
                value = T.Shuffle([value], [r % lanes]) if lanes > 1 else value
                if self.bias is not None:
                    value = value + self.bias[row]
                store(self.y, at, self.gate[at] * value, 1)


class _Emitter(GatedRowTiles):
    def __init__(self, spec: GatedRowsLinear) -> None:
        self.spec, self.isa, self.unit, self.widest = spec, spec.isa, spec.rows, spec.tokens
        self.in_features, self.y_features = spec.in_features, spec.out_features

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
            self.runs(T.int64(row_share(spec.out_features, spec.rows)[0]))
        return result[0]
