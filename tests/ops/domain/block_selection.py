"""Selections of blocks of keys."""

from collections.abc import Iterator

from sparsify.ops.onnx.block_selection import select_blocks
from tests.ops.domain.case import Case
from tests.ops.eager import block_selection as eager

NAMES = ("layer", "heads", "offset", "scale")


def cases() -> Iterator[Case]:
    for case in eager.cases(False):
        query, keys, tensors, pages, lengths, counts, *rest, _ = case.args
        selector, block, density, mass, sinks, recent = rest[4:]
        operator = select_blocks(selector)
        ports = (port.name for port in operator.inputs)
        inputs = dict(zip(ports, (query, keys, *tensors, pages, lengths, counts), strict=True))
        attributes = dict(zip(NAMES, rest[:4], strict=True))
        attributes |= {"block": block, "density": density, "mass": mass}
        attributes |= {"sinks": sinks, "recent": recent}
        yield Case(operator, inputs, attributes, (case.expected,))
