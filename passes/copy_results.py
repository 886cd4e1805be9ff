"""Results that nothing computes become copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.contracts import GraphPass, PassContext
from sparsify.effects import is_written
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class CopyResults(GraphPass):
    """A result that is an input or a weight becomes a copy, which the program makes.

    Before::

        x -> linear -> y            returns y, x

    After::

        x -> linear -> y
        x -> clone -> z             returns y, z

    For code whose caller hands out no tensors: exported C, whose results are memory of their own.
    Inputs that the program changes in place are left: a copy would have to wait for the change.
    """

    name = "copy_results"

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        output = rewriter.nodes[-1]
        copies: dict[fx.Node, fx.Node] = {}
        with rewriter.graph.inserting_before(output):
            for node in output.all_input_nodes:
                is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
                if node.op == "placeholder" and is_tensor and not is_written(node):
                    copies[node] = rewriter.call(torch.ops.aten.clone.default, (node,))
        output.args = fx.map_arg(output.args, lambda node: copies.get(node, node))
        return ()
