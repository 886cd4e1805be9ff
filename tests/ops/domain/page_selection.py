"""Bounds and selections of pages."""

from collections.abc import Iterator

from sparsify.ops.onnx.kv_cache import paged_attention
from sparsify.ops.onnx.page_selection import BOUNDS, select_pages
from tests.ops.domain.case import Case, call, of
from tests.ops.eager import page_selection as eager

NAMES = ("query", "keys", "values", "pages", "lengths", "counts", "layer", "heads", "offset")


def cases() -> Iterator[Case]:
    for case in eager.bounds():
        names = ("bounds", "keys", "pages", "lengths", "counts")
        inputs = dict(zip(names, case.args, strict=False))
        outputs = (case.written[0], case.expected)
        yield Case(BOUNDS, of(BOUNDS, inputs), {"layer": case.args[5]}, outputs)
    for case in eager.selections():
        query, keys, tensors, pages, lengths, counts, layer, heads, offset, *rest = case.args
        selector, budget, sinks, recent = rest
        operator = select_pages(selector)
        attributes = {"layer": layer, "heads": heads, "offset": offset}
        attributes |= {"budget": budget, "sinks": sinks, "recent": recent}
        inputs = dict(
            zip(
                (port.name for port in operator.inputs),
                (query, keys, *tensors, pages, lengths, counts),
                strict=True,
            )
        )
        yield Case(operator, inputs, attributes, (case.expected,))
    for case in eager.selected(False):
        *_, scale, window, softcap, _, lists, block = case.args
        operator = paged_attention(bool(softcap), True)
        inputs = of(operator, {**dict(zip(NAMES, case.args, strict=False)), "selected": lists})
        attributes = dict(zip(NAMES[6:], case.args[6:9], strict=True))
        attributes |= {"scale": scale, "window": window, "block": block, "skip": 0.0}
        attributes |= {"softcap": softcap} if softcap else {}
        yield Case(operator, inputs, attributes, (call("paged_attention", *case.args),))
