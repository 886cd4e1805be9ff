"""Readable names: nodes after the modules they come from, dimensions after what they count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree

from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS

if TYPE_CHECKING:
    from onnxscript import ir

_TOKENS = ("x", "query", "key")
"""Ports whose operand says in which module an operator stands."""

SITE = f"{DOMAIN}.site"
"""The key of a node's metadata that holds its site."""

_IMAGE = {2: "height", 3: "width"}


def name_nodes(model: ir.Model) -> dict[ir.Node, str]:
    """Names our nodes and their results after sites.

    A node with a weight is named after its module, another (attention, say) after the module in
    which the first operand was made, ``encoder.layer.0.attention.self/AttentionMask``.

    Returns:
        The site of each node of ours.
    """
    sites: dict[ir.Node, str] = {}
    taken: Counter[str] = Counter()
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        own = _own_site(node)
        sites[node] = own or _parent_site(node, sites)
        node.name = _numbered(own or f"{sites[node]}/{node.op_type}".lstrip("/"), taken)
        if len(node.outputs) == 1:
            node.outputs[0].name = node.name
    return sites


def tidy(model: ir.Model) -> None:
    """Names what the exporter numbered, and removes the notes that libraries left.

    A standard operator has the name of its result, or, out of the body of one of ours, its site's.
    """
    taken: Counter[str] = Counter()
    for node in model.graph:
        ours = {key: text for key, text in node.metadata_props.items() if key.startswith(DOMAIN)}
        node.metadata_props.clear()
        node.metadata_props.update(ours)
        if node.domain != DOMAIN:
            site = ours.get(SITE)
            made = f"{site}/{node.op_type}" if site else node.outputs[0].name or node.op_type
            node.name = _numbered(made, taken)
    for value in (*_values(model), *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _numbered(name: str, taken: Counter[str]) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


def _own_site(node: ir.Node) -> str:
    """The module whose weight the node reads, or nothing."""
    ports = ONNX_OPERATORS[node.op_type].inputs
    for port, value in zip(ports, node.inputs, strict=True):
        if port.constant or (port.name == "weight" and value.const_value is not None):
            return value.name.partition(":")[0].removesuffix(".weight")
    return ""


def _parent_site(node: ir.Node, sites: dict[ir.Node, str]) -> str:
    """The module in which the tokens were made that the node reads."""
    ports = ONNX_OPERATORS[node.op_type].inputs
    for port, value in zip(ports, node.inputs, strict=True):
        maker = value.producer() if port.name in _TOKENS else None
        if maker in sites:
            return sites[maker].rpartition(".")[0] if _own_site(maker) else sites[maker]
    return ""


def name_outputs(model: ir.Model, exported: ExportedProgram, states: Sequence[str]) -> None:
    """Names outputs after their place in what the model returns, ``last_hidden_state``.

    Args:
        exported: the program before its states became outputs.
        states: those that follow the results; they become ``new_keys``, ``new_values``.
    """
    specs = exported.graph_signature.output_specs
    user = [spec.arg for spec in specs if spec.kind == OutputKind.USER_OUTPUT]
    results = [
        name
        for name, argument in zip(_output_names(exported), user, strict=True)
        if not isinstance(argument, ConstantArgument)
    ]
    names = [*results, *(f"new_{state}" for state in states)]
    taken = {value.name for value in model.graph.inputs}
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name if name not in taken else f"output_{name}"


def _output_names(exported: ExportedProgram) -> list[str]:
    spec = exported.call_spec.out_spec
    assert spec is not None
    tree = _pytree.tree_unflatten(range(spec.num_leaves), spec)
    paths = [path for path, _ in _pytree.tree_flatten_with_path(tree)[0]]
    names = ["_".join(map(_step, path)) for path in paths]
    return [f"output_{n}" if n.isdigit() else n or "output" for n in names]


def _step(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def name_dimensions(model: ir.Model) -> None:
    """Renames symbols of shapes (``s43``) after the axis of the input that first has them."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, extent in enumerate(value.shape or ()):
            symbol = getattr(extent, "value", None)
            if symbol is not None and symbol not in names and symbol.isidentifier():
                names[symbol] = _axis_name(value, axis, set(names.values()))
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b" if names else r"(?!)")
    for value in _values(model):
        _rename(value, pattern, names)


def _axis_name(value: ir.Value, axis: int, taken: set[str]) -> str:
    rank = len(value.shape)
    if axis == 0:
        name = "batch"
    elif rank == 2 and value.dtype is not None and value.dtype.is_integer():
        name = "sequence"
    elif rank == 4 and axis in _IMAGE:
        name = _IMAGE[axis]
    else:
        name = f"{value.name}_{axis}"
    return name if name not in taken else f"{value.name}_{axis}"


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _rename(value: ir.Value, symbols: re.Pattern[str], names: dict[str, str]) -> None:
    from onnxscript import ir

    def renamed(extent: Any) -> Any:
        if isinstance(extent, int) or extent.value is None:
            return extent
        text = symbols.sub(lambda found: names[found[0]], extent.value)
        # A size that export specialised is still a symbol, whose name is the number.
        return int(text) if text.isdigit() else ir.SymbolicDim(text)

    if value.shape is not None:
        value.shape = ir.Shape(map(renamed, value.shape))
