"""State that the caller owns and programs change in place: a paged cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify.artefact.files import Contents
from sparsify.compiled import CompiledModel
from sparsify.compiler import Builder, compile_programs
from sparsify.config import CompileConfig
from sparsify.program import Program, ProgramSet
from sparsify.rewriter import share_weights

from .conftest import assemble_programs, in_eager

LAYERS, PAGES, HEADS, SIZE = 2, 6, 2, 4
FEATURES = HEADS * SIZE
NAMES = ("x", "pages", "starts", "counts", "keys", "values")


class Steps(nn.Module):
    """Two layers of attention over the cache; the second append of `echo` has no reader."""

    def __init__(self, echo: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(FEATURES, 3 * FEATURES) for _ in range(LAYERS))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
        self.echo = echo

    def forward(
        self,
        x: torch.Tensor,
        pages: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        ops = torch.ops.sparsify
        offsets = [FEATURES, 2 * FEATURES]
        for index, layer in enumerate(self.layers):
            qkv = layer(x)
            lengths = ops.kv_append(keys, values, qkv, qkv, pages, starts, counts, index, offsets)
            if not self.echo or index == 0:
                x = x + ops.paged_attention(
                    qkv, keys, values, pages, lengths, counts, index, HEADS, 0, 0.5
                )
        return x


def inputs(length: int, start: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(2, length, FEATURES, generator=generator),
        "pages": torch.tensor([[4, 0], [1, 3]], dtype=torch.int32),
        "starts": torch.tensor([start, start]),
        "counts": torch.tensor([length, max(1, length - 1)]),
    }


def cache() -> dict[str, torch.Tensor]:
    return {
        "keys": torch.zeros(LAYERS, PAGES, HEADS, SIZE, 16),
        "values": torch.zeros(LAYERS, PAGES, HEADS, 16, SIZE),
    }


def exported(model: nn.Module, length: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes: dict[str, Any] = {name: {0: batch} for name in NAMES[:4]}
    if length > 1:
        shapes["x"][1] = torch.export.Dim("length", min=1, max=32)
    arguments = {**inputs(length), **cache()}
    return torch.export.export(
        model, (), arguments, dynamic_shapes={**shapes, "keys": None, "values": None}
    )


def programs(model: nn.Module) -> ProgramSet:
    pairs = {"prefill": 20, "decode": 1}
    return share_weights(Program(name, exported(model, n)) for name, n in pairs.items())


Call = Callable[..., torch.Tensor]


def generate(prefill: Call, decode: Call) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """A prompt of 9 tokens and three single ones over one cache."""
    state = cache()
    found = [prefill(**inputs(9), **state)]
    found += [decode(**inputs(1, start, seed=start), **state) for start in (9, 10, 11)]
    return found, state


def assert_generates(model: CompiledModel, net: nn.Module) -> None:
    with torch.no_grad():
        expected, filled = generate(net, net)
    found, state = generate(model.entry("prefill"), model.entry("decode"))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert filled["keys"].abs().sum() > 0
    for name, tensor in filled.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["attended", "unread"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    return Steps(request.param).eval()


@pytest.fixture(scope="module")
def model(net: nn.Module) -> CompiledModel:
    return assemble_programs(programs(net))


def attention_apart(node: torch.fx.Node) -> str | None:
    return "no kernel" if "paged_attention" in str(node.target) else None


def appends_apart(node: torch.fx.Node) -> str | None:
    return "no kernel" if "kv_append" in str(node.target) else None


def test_the_programs_change_the_callers_tensors(net: nn.Module) -> None:
    prefill, decode = programs(net)
    with torch.no_grad():
        expected, filled = generate(net, net)
    found, state = generate(prefill.run, decode.run)
    assert [node.name for node in prefill.state()] == ["keys", "values"]
    for got, wanted in zip((*found, *state.values()), (*expected, *filled.values()), strict=True):
        torch.testing.assert_close(got, wanted)


def test_entries_go_on_where_others_stopped(model: CompiledModel, net: nn.Module) -> None:
    assert_generates(model, net)


@pytest.mark.parametrize("unsupported", [attention_apart, appends_apart])
def test_regions_may_part_writers_and_readers(
    net: nn.Module, unsupported: Callable[[torch.fx.Node], str | None]
) -> None:
    model = assemble_programs(programs(net), unsupported=unsupported)
    assert len(model.entry("prefill").plan.regions) > 2
    assert_generates(model, net)


def test_a_saved_model_keeps_its_writes(
    model: CompiledModel, net: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "steps.sparsify"
    model.save(path)
    contents = Contents.open(path, trusted=False)
    assert_generates(in_eager(contents.compilation()), net)
    prefill, decode = contents.portable()
    assert [node.name for node in decode.state()] == ["keys", "values"]
    assert generate(prefill.run, decode.run)[1]["values"].abs().sum() > 0


def test_it_compiles_with_kernels(net: nn.Module, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path))
    made = programs(net)
    captured = {program.name: program.exported for program in made}
    compiled = compile_programs(
        Builder.of(CompileConfig(num_threads=1)), captured, lambda: made, {}
    )
    assert_generates(compiled, net)
    compiled.save(tmp_path / "steps.sparsify")
    assert_generates(sparsify.load(tmp_path / "steps.sparsify"), net)


@pytest.mark.parametrize(
    ("unfit", "message"),
    [
        (lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), r"not contiguous \(strides"),
        (lambda t: torch.zeros(t.numel() + 1)[1:].view(t.shape), "no multiple of 64 bytes"),
        (lambda t: t.clone().requires_grad_(), r"autograd watches it; pass its \.detach"),
        (lambda t: torch.complex(t, -t).conj().imag, "not contiguous"),
    ],
    ids=["strided", "misaligned", "autograd", "negated"],
)
def test_state_that_would_be_copied_is_refused(
    model: CompiledModel, unfit: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    state = cache()
    state["values"] = unfit(state["values"])
    with pytest.raises(ValueError, match=rf"'values' of shape .* is changed in place, .*{message}"):
        model.entry("decode")(**inputs(1), **state)


def test_state_that_overlaps_is_refused(model: CompiledModel) -> None:
    size = LAYERS * PAGES * HEADS * SIZE * 16
    both = torch.zeros(size + 64)
    keys, values = (both[i : i + size].view(LAYERS, PAGES, HEADS, -1) for i in (0, 64))
    state = {"keys": keys.unflatten(3, (SIZE, 16)), "values": values.unflatten(3, (16, SIZE))}
    with pytest.raises(ValueError, match=r"'keys' .*shares memory with argument 'values'"):
        model.entry("decode")(**inputs(1), **state)
    halves = torch.zeros(2, size).unbind()
    shapes = [tensor.shape for tensor in cache().values()]
    apart = {n: h.view(s) for n, h, s in zip(cache(), halves, shapes, strict=True)}
    model.entry("decode")(**inputs(1), **apart)
    assert all(half.abs().sum() > 0 for half in halves)
