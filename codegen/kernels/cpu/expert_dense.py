"""Linears of experts on rows of tokens, weights in panels as wide as a vector.

for chunk of panels, expert (parallel):
  for two panels:                        # with a gate: of the gate and of up, the same features
    for tile of the expert's tokens:     # tokens x 2 accumulators in registers
      for k: acc[token, :] += x[token, k] * panel[k, :]
      store activation(gate) * up, or activation(acc)

Lanes are output features, so tokens need no padding, and rows of ``x`` are read where they lie: the
first projection finds a token's row by the plan. Two panels are read from memory for the first tile
and stay in the second-level cache for the others, which meanwhile ask for the next two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.expert_plan import Plan
from sparsify.codegen.kernels.cpu.math import ACTIVATIONS, Vector
from sparsify.codegen.kernels.cpu.rows import ahead, ragged_load
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Registers,
    Tensor,
    arguments,
    bind,
    load,
    prefetch,
    prim_func,
    splat,
    store,
    symbol,
)
from sparsify.layouts import PackedDense, Stack

_AHEAD = 1024
"""Floats of a panel between a prefetch and its use."""

_CHUNK_BYTES = 1 << 20
"""Weights of one task, about."""


@dataclass(frozen=True)
class DenseExperts:
    """The kernel's specification.

    Attributes:
        stack: the weights; with a gate, two matrices an expert.
        gated: ``activation(gate) * up``.
        bias: one is added to the sums.
        slots: of the pairs whose token is read; 0: rows of ``x`` are in the order of the plan.
    """

    isa: Isa
    stack: Stack
    gated: bool
    activation: str
    bias: bool
    slots: int

    def __post_init__(self) -> None:
        layout = self.stack.layout
        if not isinstance(layout, PackedDense) or layout.rows != self.isa.vector:
            raise ValueError(
                f"dense experts: weights are in {layout}, on {self.isa.name} the kernel takes "
                f"packed_dense{{rows={self.isa.vector}}}"
            )

    @property
    def experts(self) -> int:
        return self.stack.count // self.parts

    @property
    def parts(self) -> int:
        return 2 if self.gated else 1

    @property
    def name(self) -> str:
        stack, bias = self.stack, "_bias" * self.bias
        source = f"gather{self.slots}" if self.slots else "direct"
        gate = "gated" if self.gated else "plain"
        return (
            f"dense_experts_{self.isa.name}_{self.experts}x{stack.rows}x{stack.columns}_{gate}"
            f"_{self.activation}{bias}_{source}"
        )

    def build(self) -> Any:
        """A PrimFunc ``(x, plan, panels[, bias], y[positions, padded rows])``."""
        return _Emitter(self).build()


class _Emitter:
    def __init__(self, spec: DenseExperts) -> None:
        self.spec, self.width = spec, spec.isa.vector
        self.columns = spec.stack.columns
        self.pitch = spec.stack.pitch
        self.panels_of_one = self.pitch // self.width
        self.step = 1 if spec.gated else 2
        """Panels from one pair of them to the next."""
        self.units = -(-self.panels_of_one // self.step)
        wanted = self.units * 2 * self.columns * self.width * 4 / _CHUNK_BYTES
        self.share = -(-self.units // min(self.units, max(2, 2 * round(wanted / 2))))

    def build(self) -> Any:
        spec, stack = self.spec, self.spec.stack
        with prim_func(spec.name) as result:
            rows, length, positions = symbol(), symbol(), symbol()
            bias = (spec.experts, spec.parts * stack.rows)
            self.x, plan, self.panels, self.bias, self.y = arguments(
                Tensor("x", (rows, self._features())),
                Tensor("plan", (length,), "int32"),
                Tensor("panels", (stack.count * self.panels_of_one, self.columns, self.width)),
                Tensor("bias", bias) if spec.bias else None,
                Tensor("y", (positions, self.pitch)),
            )
            self.plan = Plan(spec.experts, plan, positions)
            chunks = -(-self.units // self.share)
            # Chunks are the outer order: threads get the same share however tokens are spread.
            with T.parallel(T.int64(chunks * spec.experts)) as task:
                chunk = bind(T.floordiv(task, spec.experts))
                self._task(bind(T.floormod(task, spec.experts)), chunk)
        return result[0]

    def _features(self) -> int:
        """Floats from one row of ``x`` to the next."""
        if self.spec.slots:
            return self.columns
        return -(-self.columns // self.width) * self.width

    def _task(self, expert: Expr, chunk: Expr) -> None:
        start = bind(self.plan.start(expert))
        count = bind(self.plan.end(expert) - start)
        first = bind(chunk * self.share)
        units = bind(T.min(T.int64(self.share), T.int64(self.units) - first))
        with T.If(count > 0), T.Then(), T.serial(units) as i:
            unit = bind(first + i)
            done: Expr = T.int64(0)
            for width in self._tiles():
                tiles = bind(T.floordiv(count - done, width))
                with T.serial(tiles) as tile:
                    self._tile(expert, unit, start, bind(done + tile * width), width)
                done = bind(done + tiles * width)

    def _tiles(self) -> tuple[int, ...]:
        """Tokens of a tile: the most that have registers, then powers of two below."""
        widest = max(1, self.spec.isa.registers * 3 // 8)
        powers = [1 << bit for bit in reversed(range(widest.bit_length()))]
        return (widest, *(power for power in powers if power < widest))

    def _tile(self, expert: Expr, unit: Expr, start: Expr, token: Expr, count: int) -> None:
        spec, size = self.spec, self.columns * self.width
        panels = self._panels(unit)
        first = bind(expert * (spec.parts * self.panels_of_one))
        w_at = [bind((first + panel) * size) for panel in panels]
        position = [bind(start + token + t) for t in range(count)]
        x_at = [bind(self._row(p) * self._features()) for p in position]
        total = Registers(2 * count, self.width)
        for p, panel in enumerate(panels):
            begin = bind(self._start(expert, panel, p))
            for t in range(count):
                total[2 * t + p] = begin
        distance = ahead(token, _AHEAD, self.step * size)
        with T.serial(T.int64(self.columns)) as k:
            weights = []
            for at in w_at:
                place = bind(at + k * self.width)
                prefetch(self.panels, place + distance)
                weights.append(bind(load(self.panels, place, self.width)))
            for t, at in enumerate(x_at):
                x = bind(splat(self.x[at + k], self.width))
                for p in range(2):
                    total[2 * t + p] = total[2 * t + p] + x * weights[p]
        self._finish(total, [bind(p * self.pitch) for p in position], unit, panels)

    def _row(self, position: Expr) -> Expr:
        """The row of ``x`` that belongs to a position."""
        if not self.spec.slots:
            return position
        return T.floordiv(self.plan.pair(position), self.spec.slots)

    def _panels(self, unit: Expr) -> list[Expr]:
        """The two panels of an expert that are computed together."""
        if self.spec.gated:
            return [unit, bind(unit + self.panels_of_one)]
        first = bind(unit * 2)
        if self.panels_of_one % 2:  # the last one twice, with equal results
            return [first, bind(T.min(first + 1, T.int64(self.panels_of_one - 1)))]
        return [first, bind(first + 1)]

    def _start(self, expert: Expr, panel: Expr, part: int) -> Expr:
        """What the sums of a panel begin with."""
        if self.bias is None:
            return splat(0.0, self.width)
        rows = self.spec.stack.rows
        of_part = panel - part * self.panels_of_one if self.spec.gated else panel
        skipped = part * rows if self.spec.gated else 0
        at = bind((expert * self.spec.parts) * rows + skipped + of_part * self.width)
        whole, left = divmod(rows, self.width)
        if not left:
            return load(self.bias, at, self.width)
        return T.if_then_else(
            of_part < whole,
            load(self.bias, at, self.width),
            ragged_load(self.bias, at, left, self.width),
        )

    def _finish(self, total: Registers, y_at: list[Expr], unit: Expr, panels: list[Expr]) -> None:
        """Stores the sums, then goes over them once more: the activation's code is there once."""
        spec, width, count = self.spec, self.width, len(y_at)
        activate = ACTIVATIONS[spec.activation]
        if not spec.gated:
            for t, at in enumerate(y_at):
                for p, panel in enumerate(panels):
                    value = total[2 * t + p]
                    store(self.y, at + panel * width, value, width)
            if spec.activation != "none":
                with T.serial(T.int64(count)) as t:
                    at = bind(y_at[0] + t * self.pitch)
                    values = [
                        activate(Vector(load(self.y, at + panel * width, width), width)).value
                        for panel in panels
                    ]
                    for panel, value in zip(panels, values, strict=True):
                        store(self.y, at + panel * width, value, width)
            return
        gates = T.alloc_buffer((count * width,), "float32", scope="global")
        column = bind(unit * width)
        for t, at in enumerate(y_at):
            store(gates, t * width, total[2 * t], width)
            store(self.y, at + column, total[2 * t + 1], width)
        with T.serial(T.int64(count)) as t:
            at = bind(y_at[0] + t * self.pitch + column)
            gate = activate(Vector(load(gates, t * width, width), width)).value
            store(self.y, at, gate * load(self.y, at, width), width)
