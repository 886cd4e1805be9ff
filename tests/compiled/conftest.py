"""What tests of compiled models share: small sparse models, and models run without kernels."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from sparsify.artefact.compilation import Compilation
from sparsify.artefact.graphs import SavedProgram
from sparsify.compiled import CompiledModel
from sparsify.contracts import PassContext
from sparsify.frontend.torch import capture, normalise
from sparsify.layouts import Layout, PackedDense, Sell
from sparsify.passes import PORTABLE, SPECIALISE, pipeline_text, run_pipeline
from sparsify.plan import Plan
from sparsify.program import Program, ProgramSet
from sparsify.report import Report
from sparsify.signature import parameters_of

Change = Callable[[dict[str, Any], dict[str, bytes]], None]


def changed(source: Path, target: Path, change: Change) -> Path:
    """A copy of a file with its manifest and parts changed, digests left as they were."""
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(parts.pop("manifest.json"))
    change(manifest, parts)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        archive.writestr("manifest.json", json.dumps(manifest))
    return target


class Small(nn.Module):
    """Two linears, the first one sparse, and an embedding whose table is tied to the second."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(24, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 24, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.head.weight = self.table.weight
        dropped = torch.rand(self.up.weight.shape, generator=generator) < 0.9
        self.up.weight.data[dropped] = 0

    def forward(
        self, ids: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        x = self.table(ids) * scale.unsqueeze(-1)
        y = self.down(torch.relu(self.up(x)))
        return {"logits": self.head(y if bias is None else y + bias), "hidden": y}


def examples(batch: int = 3, length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "ids": torch.randint(0, 24, (batch, length), generator=generator),
        "scale": torch.rand(batch, length, generator=generator),
    }


class Cost:
    """Sparse pays in proportion to the nonzeros."""

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        return float(nnz if isinstance(layout, Sell) else shape[0] * shape[1])

    def candidates(self, shape: tuple[int, int], nnz: int, tokens: int) -> tuple[Layout, ...]:
        return Sell(rows=4, k_block=32, window=16), PackedDense(rows=6)


class EagerExecutor:
    """Stands in for kernels: runs each region's program in PyTorch."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self.modules = {
            name: fx.GraphModule(nn.Module(), program.graph) for name, program in programs.items()
        }

    def bind(
        self, entry: str, weights: Sequence[torch.Tensor]
    ) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
        def call(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return tuple(self.modules[entry](*weights, *inputs))

        return call


def assemble(
    model: nn.Module,
    inputs: Any,
    dynamic_shapes: Any = "auto",
    unsupported: Callable[[fx.Node], str | None] | None = None,
) -> CompiledModel:
    """A compiled model without code generation."""
    exported = capture(model.eval(), inputs, dynamic_shapes)
    parameters = {"forward": parameters_of(model, exported)}
    return assemble_programs(normalise(exported), parameters, unsupported)


def assemble_programs(
    programs: ProgramSet,
    parameters: Mapping[str, tuple[str, ...]] = {},
    unsupported: Callable[[fx.Node], str | None] | None = None,
) -> CompiledModel:
    """Entry programs compiled without code generation."""
    portable = run_pipeline(programs, PORTABLE)
    context = PassContext(cost=Cost(), unsupported=unsupported)
    bound = run_pipeline(portable.programs, SPECIALISE, context)
    compilation = Compilation.of(
        tuple(map(SavedProgram.of, portable.programs)),
        portable.programs.weights,
        bound.programs,
        bound.programs.weights,
        library=None,
        target="native",
        features=(),
        pipeline=pipeline_text(SPECIALISE),
        parameters=parameters,
        num_threads=None,
        report=Report((*portable.decisions, *bound.decisions), "eager"),
    )
    return in_eager(compilation)


def in_eager(compilation: Compilation) -> CompiledModel:
    regions = [r for program in compilation.specialised for r in Plan.of(program).regions]
    return CompiledModel(compilation, EagerExecutor({r.name: r.program for r in regions}))


@pytest.fixture(scope="session")
def small() -> nn.Module:
    return Small().eval()


@pytest.fixture(scope="session")
def assembled(small: nn.Module) -> CompiledModel:
    return assemble(small, examples())
