"""Pooling to the largest: TVM's begins with the largest finite number, and drops NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import te, tirx

from sparsify.codegen.operators.arguments import arguments_of
from sparsify.codegen.operators.reductions import LARGEST, value_reducer

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_max_pool(node: fx.Node, lowering: Lowering) -> Any:
    """Windows over the last dims. No kernel computes the positions of the largest."""
    a = arguments_of(node)
    value = node.meta["val"]
    pooled = value[0] if isinstance(value, tuple | list) else value
    rank = len(a["kernel_size"])
    window = _Window(
        tuple(a["kernel_size"]),
        _spread(a["stride"] or a["kernel_size"], rank),
        _spread(a["padding"], rank),
        _spread(a["dilation"], rank),
    )
    x, shape = lowering.tensor(a["self"]), lowering.type_of(pooled).shape.values
    return lowering.block_builder.emit_te(
        window.largest, x, list(shape)[-rank:], primfunc_name_hint="max_pool"
    )


@dataclass(frozen=True)
class _Window:
    """A window over the last dims of a tensor, as pooling moves it."""

    extents: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def largest(self, x: te.Tensor, shape: Sequence[Any]) -> te.Tensor:
        """The largest of each window; what lies outside of the tensor is not looked at."""
        leading, sizes = x.shape[: -len(shape)], x.shape[-len(shape) :]
        offsets = [te.reduce_axis((0, extent)) for extent in self.extents]
        reduce = value_reducer(LARGEST)

        def at(*indices: Any) -> Any:
            places = [
                i * stride - pad + offset * apart
                for i, stride, pad, offset, apart in zip(
                    indices[len(leading) :],
                    self.strides,
                    self.padding,
                    offsets,
                    self.dilation,
                    strict=True,
                )
            ]
            inside = tirx.all(
                *(tirx.all(p >= 0, p < size) for p, size in zip(places, sizes, strict=True))
            )
            element = x(*indices[: len(leading)], *places)
            return reduce(tirx.if_then_else(inside, element, LARGEST.start(x.dtype)), axis=offsets)

        return te.compute((*leading, *shape), at, "max_pool")


def _spread(values: Sequence[int], rank: int) -> tuple[int, ...]:
    """One number for each dim, where one is given for all."""
    return tuple(values) * (rank // len(values))
