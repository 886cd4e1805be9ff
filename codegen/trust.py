"""Operators that TVM's importer reads wrongly or not at all, as found by running them.

``tests/codegen/test_importer.py`` compares the importer with PyTorch on the operators of encoders
and convolutional networks, with dynamic sizes. An operator that neither it nor this table names
is compiled unproven. What canonicalisation (`sparsify.passes.canonicalize`) cannot put right is
listed here, and stays with PyTorch.

Left as it is: integers of 32 and 64 bits are taken never to overflow where they are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.float64)


def untrusted_reason(node: fx.Node) -> str | None:
    """Why a node must stay with PyTorch, None if the importer is right about it."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    for operand in node.all_input_nodes:
        dtype = getattr(operand.meta.get("val"), "dtype", None)
        if (
            dtype is not None
            and (dtype.is_complex or dtype.is_floating_point)
            and (dtype not in _FLOATS)
            and not casts_halves(node)
        ):
            return f"{target} reads {dtype}, for which there are no kernels"
    if target in _NEVER:
        return f"{target}: {_NEVER[target]}"
    check = _CHECKS.get(target)
    reason = None if check is None else check(node, _arguments(node))
    return None if reason is None else f"{target}: {reason}"


def casts_halves(node: fx.Node) -> bool:
    """Whether a node turns float16 into float32 or back, which is all that kernels do with it."""
    if node.target != aten._to_copy.default:
        return False
    types = {value.meta["val"].dtype for value in (node, *node.all_input_nodes)}
    return types == {torch.float16, torch.float32}


def _arguments(node: fx.Node) -> dict[str, Any]:
    found = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _dynamic(node: Any) -> bool:
    return not all(isinstance(size, int) for size in _shape(node))


Check = Callable[[fx.Node, dict[str, Any]], str | None]


def _attention(node: fx.Node, options: dict[str, Any]) -> str | None:
    query = _shape(options["query"])
    if len(query) != 4:
        return f"the query has {len(query)} dims, not 4"
    if options["attn_mask"] is not None and options["attn_mask"].meta["val"].dtype == torch.bool:
        return "the importer takes no boolean mask"
    if options["enable_gqa"]:
        return "the importer does not repeat grouped heads"
    scale = options["scale"]
    if not isinstance(query[3], int) or (
        scale is not None and not math.isclose(scale, query[3] ** -0.5, rel_tol=1e-6)
    ):
        return "the importer ignores the scale"
    return None


def _normalisation(node: fx.Node, options: dict[str, Any]) -> str | None:
    missing = [k for k in ("weight", "bias") if options[k] is None]
    return f"the importer needs a {' and a '.join(missing)}" if missing else None


def _integer_power(node: fx.Node, options: dict[str, Any]) -> str | None:
    exponent = options["exponent"]
    if node.meta["val"].dtype in _FLOATS or not isinstance(exponent, fx.Node):
        return None
    return "integers to a power that is a tensor"


def _variance(node: fx.Node, options: dict[str, Any]) -> str | None:
    dims = options["dim"]
    shape = _shape(options["self"])
    reduced = shape if not dims else [shape[d] for d in dims]
    if options["correction"] == 0 or all(isinstance(size, int) for size in reduced):
        return None
    return "a correction over a dynamic dim"


def _product(node: fx.Node, options: dict[str, Any]) -> str | None:
    dtype = node.meta["val"].dtype
    return (
        None if dtype == torch.float32 else f"the importer multiplies {dtype} matrices as float32"
    )


def _extreme(node: fx.Node, options: dict[str, Any]) -> str | None:
    return "of truth values" if node.meta["val"].dtype == torch.bool else None


def _ramp(node: fx.Node, options: dict[str, Any]) -> str | None:
    step = options.get("step", 1)
    if isinstance(step, fx.Node) or step <= 0:
        return "the importer counts up only"
    return None


def _index(node: fx.Node, options: dict[str, Any]) -> str | None:
    if any(
        i is None or i.meta["val"].dtype in (torch.bool, torch.uint8) for i in options["indices"]
    ):
        return "the importer reads integer indices of leading dims only"
    return None


def _index_put(node: fx.Node, options: dict[str, Any]) -> str | None:
    reason = _index(node, options)
    if reason is None and len(options["indices"]) != len(_shape(options["self"])):
        return "the importer needs an index for every dim"
    return reason


def _numbers(node: fx.Node, options: dict[str, Any]) -> str | None:
    """Scalars and sizes that must be constants."""
    for value in options.values():
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(p, fx.Node) and not _is_tensor(p) for p in parts):
            return "a size or a bound that depends on the input's shape"
    return None


def _largest(node: fx.Node, options: dict[str, Any]) -> str | None:
    none = "TVM takes a count of 0 for all" if options["k"] == 0 else None
    return none or _numbers(node, options)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _static(node: fx.Node, options: dict[str, Any]) -> str | None:
    operands = [o for o in node.all_input_nodes if _is_tensor(o)]
    return "a dynamic shape" if any(_dynamic(o) for o in operands) else None


def _embedding(node: fx.Node, options: dict[str, Any]) -> str | None:
    return "a table of dynamic shape" if _dynamic(options["weight"]) else None


def _average_pool(node: fx.Node, options: dict[str, Any]) -> str | None:
    given = options["divisor_override"] is not None
    return "the importer ignores divisor_override" if given else None


def _pool_with_indices(node: fx.Node, options: dict[str, Any]) -> str | None:
    read = any(user.args[1] == 1 for user in node.users if user.target is not None)
    return "the importer does not compute the indices" if read else None


def _batched(node: fx.Node, options: dict[str, Any]) -> str | None:
    if len(_shape(options["input"])) != len(_shape(options["weight"])):
        return "the importer needs a batch dim"
    return None


def _resized(node: fx.Node, options: dict[str, Any]) -> str | None:
    rounded = node.meta["val"].dtype not in _FLOATS
    return "means of integers, which are rounded" if rounded else None


_NEVER: dict[Any, str] = {
    aten.grid_sampler_2d.default: "the importer swaps its layout",
    aten.as_strided.default: "the importer reads contiguous strides only",
    aten.empty.memory_format: "contents are undefined",
}
_CHECKS: dict[Any, Check] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: _normalisation,
    aten.group_norm.default: _normalisation,
    aten.pow.Scalar: _integer_power,
    aten.pow.Tensor_Tensor: _integer_power,
    aten.var.correction: _variance,
    aten.std.correction: _variance,
    aten.linear.default: _product,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _product,
    aten.amax.default: _extreme,
    aten.amin.default: _extreme,
    aten.arange.start_step: _ramp,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.clamp.default: _numbers,
    aten.topk.default: _largest,
    aten.split_with_sizes.default: _numbers,
    aten.slice_scatter.default: _static,
    aten.embedding.default: _embedding,
    aten.avg_pool2d.default: _average_pool,
    aten.max_pool2d_with_indices.default: _pool_with_indices,
    aten.conv1d.default: _batched,
    aten.conv2d.default: _batched,
    aten.conv3d.default: _batched,
    aten.upsample_bilinear2d.default: _resized,
    aten.upsample_bilinear2d.vec: _resized,
}
