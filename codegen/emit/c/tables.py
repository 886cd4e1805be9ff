"""Straight-line code as the tables of runtime/sparsify.h."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.ir.prim import expr as prim

from sparsify.codegen.emit.c.arena import ALIGNMENT, Arena, Bounds, item_bytes
from sparsify.codegen.emit.c.straight import Call, ExportError, Extent, StraightCode, View

MAX_DIMS, MAX_COMPUTED, MAX_OPERANDS, _SIZE = 6, 64, 32, 0x8000
"""Limits of sparsify.h and sparsify.c, and the mark of an operand that is a size."""

_WHERE = {"input": "INPUT", "output": "OUTPUT", "weight": "WEIGHTS", "state": "STATE",
          "arena": "ARENA"}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """An input or output as the header tells it."""

    name: str
    dtype: str
    least: tuple[int, ...]
    most: tuple[int, ...]
    text: str

    @property
    def nbytes(self) -> int:
        """At its largest."""
        return item_bytes(self.dtype) * math.prod(self.most)


@dataclass(frozen=True)
class Tables:
    """Initialisers of an entry's tables, as C text; see sparsify.h.

    Attributes:
        bindings: ``(symbol, where an input brings it)``.
        computed: expressions of the sizes that are known at run time only.
        equal: pairs of expressions that must be the same.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    values: tuple[str, ...]
    sizes: tuple[int, ...]
    operands: tuple[int, ...]
    calls: tuple[tuple[str | None, int, int], ...]
    bindings: tuple[tuple[str, str], ...]
    computed: tuple[str, ...]
    equal: tuple[tuple[str, str], ...]


class _Pool:
    """A list in which runs of items are kept once."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self._known: dict[tuple[int, ...], int] = {}

    def add(self, run: Iterable[int]) -> int:
        run = tuple(run)
        if run not in self._known:
            self._known[run] = len(self.items)
            self.items.extend(run)
        return self._known[run]


class Tabulator:
    """Builds an entry's tables.

    Args:
        weights: offset in bytes of each weight in the file.
        state: offset in bytes of each tensor of the state in its block.
    """

    def __init__(
        self,
        code: StraightCode,
        bounds: Bounds,
        arena: Arena,
        weights: Sequence[int],
        state: Sequence[int],
    ) -> None:
        self.code, self.bounds, self.arena = code, bounds, arena
        self._offsets: dict[str, Sequence[int] | Mapping[int, int]] = {
            "weight": weights,
            "state": state,
            "arena": arena.offsets,
        }
        self._computed: dict[str, int] = {}
        self._sizes, self._operands = _Pool(), _Pool()
        self._values: dict[str, int] = {}

    def tables(
        self,
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> Tables:
        """The tables; names in the order of the code.

        Raises:
            ExportError: they would not fit the types of sparsify.h.
        """
        for view in (*self.code.inputs, *self.code.outputs):
            self._value(view, shared=False)
        calls = tuple(self._call(call) for call in self.code.calls)
        lists = {
            "values": self._values,
            "sizes": self._sizes.items,
            "operands": self._operands.items,
        }
        for what, items in lists.items():
            if len(items) >= _SIZE:
                raise ExportError(
                    f"entry {self.code.name!r} has {len(items)} different {what}, and the tables "
                    f"take {_SIZE - 1}; export the model in parts"
                )
        if len(self._computed) > MAX_COMPUTED:
            raise ExportError(
                f"entry {self.code.name!r}: {len(self._computed)} different sizes depend on the "
                f"inputs, at most {MAX_COMPUTED} can; compile with dynamic_shapes=None"
            )
        return Tables(
            tuple(self._specs(input_names, self.code.inputs)),
            tuple(self._specs(output_names, self.code.outputs)),
            tuple(self._values),
            tuple(self._sizes.items) or (0,),
            tuple(self._operands.items) or (0,),
            calls,
            self._bindings(),
            tuple(self._computed),
            tuple(dict.fromkeys((c_expression(a), c_expression(b)) for a, b in self.code.equal)),
        )

    def _specs(self, names: Sequence[str], views: Sequence[View]) -> Iterator[Spec]:
        for name, view in zip(names, views, strict=True):
            extents = ", ".join(map(c_expression, view.shape))
            text = f"{view.dtype} [{extents}]"
            least = tuple(map(self.bounds.least, view.shape))
            yield Spec(name, view.dtype, least, self.bounds.shape(view), text)

    def _bindings(self) -> tuple[tuple[str, str], ...]:
        found: dict[str, str] = {}
        for index, view in enumerate(self.code.inputs):
            for dim, extent in enumerate(view.shape):
                if isinstance(extent, tvm.ir.Var):
                    found.setdefault(extent.name, f"inputs[{index}].shape[{dim}]")
        for name, symbol in self.code.symbols().items():  # what only the state has
            found.setdefault(name, str(self.bounds.largest(symbol)))
        return tuple(found.items())

    def _call(self, call: Call) -> tuple[str | None, int, int]:
        if len(call.operands) > MAX_OPERANDS:
            raise ExportError(f"kernel {call.kernel}: {len(call.operands)} operands, at most 32")
        run = [
            self._value(operand)
            if isinstance(operand, View)
            else _SIZE | self._sizes.add([self._size(operand)])
            for operand in call.operands
        ]
        return call.kernel, self._operands.add(run), len(run)

    def _value(self, view: View, *, shared: bool = True) -> int:
        if len(view.shape) > MAX_DIMS:
            raise ExportError(
                f"entry {self.code.name!r}: a tensor of {len(view.shape)} dimensions; "
                f"exported C takes {MAX_DIMS} at most"
            )
        where, index = view.storage.where, view.storage.index
        if where in self._offsets:
            index = self._offsets[where][index] // ALIGNMENT
        shape = self._sizes.add(map(self._size, view.shape))
        text = (
            f"{{SPARSIFY_IN_{_WHERE[where]}, SPARSIFY_{view.dtype.upper()}, {len(view.shape)}, "
            f"{shape}, {index}}}"
        )
        if not shared:  # its place tells which input or output it is
            text += f" /* {where} {view.storage.index} */"
        return self._values.setdefault(text, len(self._values))

    def _size(self, extent: Extent) -> int:
        if isinstance(extent, tirx.IntImm):
            if not 0 <= extent.value < 1 << 31:
                raise ExportError(f"entry {self.code.name!r}: a size of {extent.value}")
            return int(extent.value)
        place = self._computed.setdefault(c_expression(extent), len(self._computed))
        return -1 - place


_OPERATORS = {
    prim.Add: "({} + {})",
    prim.Sub: "({} - {})",
    prim.Mul: "({} * {})",
    prim.FloorDiv: "sparsify_floordiv({}, {})",
    prim.FloorMod: "sparsify_floormod({}, {})",
    prim.Min: "sparsify_min({}, {})",
    prim.Max: "sparsify_max({}, {})",
}


def c_expression(extent: Extent) -> str:
    """A size as C.

    Raises:
        ExportError: an operation that sizes do not have.
    """
    if isinstance(extent, tirx.IntImm):
        return str(int(extent.value))
    if isinstance(extent, tvm.ir.Var):
        return str(extent.name)
    if isinstance(extent, prim.Cast):
        return c_expression(extent.value)
    form = _OPERATORS.get(type(extent))
    if form is None:
        raise ExportError(f"a size is computed as {extent}, which has no C form")
    return form.format(c_expression(extent.a), c_expression(extent.b))
