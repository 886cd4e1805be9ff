"""Conversions to lanes and back, as a program states them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify.codegen.operators.arguments import arguments_of, extents_of, from_lanes, to_lanes

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_to_lanes(node: fx.Node, lowering: Lowering) -> Any:
    return to_lanes(lowering, lowering.tensor(node.args[0]), node.meta["val"].shape[0])


def convert_from_lanes(node: fx.Node, lowering: Lowering) -> Any:
    arguments = arguments_of(node)
    leading = extents_of(lowering, arguments["leading"])
    return from_lanes(lowering, lowering.tensor(arguments["x"]), leading)
