"""Results that nothing computes: inputs and weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsify.passes.copy_results import CopyResults


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, x * self.scale, y, self.scale, x


def test_each_is_copied_once(import_model: Callable, apply: Callable) -> None:
    result = apply(import_model(Given(), torch.randn(2, 4), torch.randn(3)), CopyResults())
    (program,) = result.programs
    first, product, second, scale, again = program.graph.output_node().args[0]
    assert first is again and first.name != "x"
    for copied, source in ((first, "x"), (second, "y")):
        assert copied.target == torch.ops.aten.clone.default and copied.args[0].name == source
    assert scale.target == torch.ops.aten.clone.default
    assert program.weight_names[scale.args[0].name] == "scale"
    assert product.target == torch.ops.aten.mul.Tensor
    assert result.programs.weights.keys() == {"scale"}


def test_what_is_computed_stays(import_model: Callable, apply: Callable) -> None:
    programs = import_model(nn.Linear(4, 4), torch.randn(2, 4))
    (program,) = apply(programs, CopyResults()).programs
    before = [node.target for node in programs["forward"].graph.nodes]
    assert [node.target for node in program.graph.nodes] == before
