"""A decoder layer over the paged cache, lowered and run step after step against eager PyTorch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.codegen.build import compile_library
from sparsify.codegen.lower import lower
from sparsify.codegen.runtime.executor import Executor
from sparsify.codegen.support import unsupported_reason
from sparsify.codegen.target import Target
from sparsify.frontend.torch import import_torch
from sparsify.layouts import parse
from sparsify.passes import run_pipeline
from sparsify.passes.canonicalize import Canonicalize
from sparsify.program import Program

OPS = torch.ops.sparsify
SELL, DENSE = "sell{rows=8,k_block=24,window=16}", "packed_dense{rows=6}"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED = 40, 4, 2, 12, 33
LAYERS, POOL, WORDS = 2, 40, 50


class Linear(nn.Module):
    """A linear operator of ours, its packed weight in buffers."""

    def __init__(self, layout: str, out: int, features: int) -> None:
        super().__init__()
        weight = torch.randn(out, features) * (torch.rand(out, features) < 0.4) / features**0.5
        for name, tensor in parse(layout).pack(weight).items():
            self.register_buffer(name, tensor)
        self.names, self.fixed = tuple(parse(layout).tensors), (layout, out, features)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, lanes: bool = False
    ) -> torch.Tensor:
        weight = [getattr(self, name) for name in self.names]
        return OPS.sparse_linear(x, weight, *self.fixed, None, "none", residual, lanes)


class Decoder(nn.Module):
    """One layer, then the last real token of each row: what a language model is made of."""

    def __init__(self, lanes: bool) -> None:
        super().__init__()
        self.lanes = lanes
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.norm = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.qkv = Linear(SELL, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
        self.out = Linear(DENSE, HIDDEN, HEADS * HEAD_DIM)
        self.up, self.down = Linear(SELL, 2 * FEED, HIDDEN), Linear(DENSE, HIDDEN, FEED)
        self.register_buffer("frequencies", 1e-4 ** (torch.arange(6) / 6))

    def forward(
        self,
        ids: torch.Tensor,
        pages: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        batch, length = ids.shape
        lanes, extents = self.lanes, [batch, length] if self.lanes else []
        positions = starts.unsqueeze(1) + torch.arange(length)
        angles = positions.unsqueeze(2).float() * self.frequencies
        angles = torch.cat((angles, angles), 2)
        given = self.words(ids), angles.cos(), angles.sin()
        x, cos, sin = map(OPS.to_lanes, given) if lanes else given
        normed = OPS.fused_norm(x, self.norm, None, 1e-6, "rms", lanes)
        qkv = OPS.rotary(self.qkv(normed, None, lanes), cos, sin, HEADS + KV_HEADS, HEAD_DIM, lanes)
        offsets = [HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM]
        lengths = OPS.kv_append(keys, values, qkv, qkv, pages, starts, counts, 1, offsets, extents)
        y = OPS.paged_attention(
            qkv, keys, values, pages, lengths, counts, 1, HEADS, 0, 0.3, 24, 5.0, extents
        )
        x = self.out(y, x, lanes)
        normed = OPS.fused_norm(x, self.norm, None, 1e-6, "rms", lanes)
        x = self.down(OPS.gated(self.up(normed, None, lanes), "silu", lanes), x, lanes)
        x = OPS.from_lanes(x, [batch, length]) if lanes else x
        last = torch.arange(batch) * length + (counts - 1).clamp(min=0)
        return x.flatten(0, 1).index_select(0, last)


class State:
    """A cache and a scrambled page table for ``batch`` sequences."""

    def __init__(self, batch: int) -> None:
        self.keys = torch.zeros(LAYERS, POOL, KV_HEADS, HEAD_DIM, 16)
        self.values = torch.zeros(LAYERS, POOL, KV_HEADS, 16, HEAD_DIM)
        self.pages = torch.randperm(POOL, dtype=torch.int32)[: batch * 8].view(batch, 8)
        self.starts = torch.zeros(batch, dtype=torch.int64)

    def inputs(self, length: int, counts: list[int]) -> tuple[torch.Tensor, ...]:
        ids = torch.randint(WORDS, (len(counts), length))
        real = torch.tensor(counts)
        return ids, self.pages, self.starts.clone(), real, self.keys, self.values


ENTRIES = {"decode": (False, 1), "prefill rows": (False, 20), "prefill lanes": (True, 20)}

Compiled = tuple[dict[str, nn.Module], dict[str, Program], Executor]


def program_of(model: nn.Module, length: int) -> Program:
    batch = {0: torch.export.Dim("b", min=1, max=8 if length == 1 else 64)}
    ids = batch if length == 1 else {**batch, 1: torch.export.Dim("s", min=1, max=128)}
    inputs = State(2).inputs(length, [length, 1])
    shapes = (ids, batch, batch, batch, None, None)
    programs = import_torch(model.eval(), inputs, dynamic_shapes=shapes)
    return run_pipeline(programs, [Canonicalize()]).programs["forward"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """All entries in one library; the row-major ones are one model."""
    rows = Decoder(lanes=False)
    models = {False: rows, True: copy.deepcopy(rows)}
    models[True].lanes = True
    entries = {name: program_of(models[lanes], n) for name, (lanes, n) in ENTRIES.items()}
    path = tmp_path_factory.mktemp("decoder") / "decoder.so"
    named = {name.replace(" ", "_"): program for name, program in entries.items()}
    compile_library(named, Target.parse("native"), path)
    return {n: models[lanes] for n, (lanes, _) in ENTRIES.items()}, entries, Executor(path, 2)


@pytest.fixture
def step(compiled: Compiled) -> Callable[..., None]:
    """Runs a step compiled and eager, each on its state; compares results and caches."""
    models, programs, executor = compiled

    def run(name: str, state: State, eager: State, length: int, counts: list[int]) -> None:
        program = programs[name]
        weights = [program.exported.state_dict[n] for n in program.weight_names.values()]
        inputs = state.inputs(length, counts)
        (found,) = executor.bind(name.replace(" ", "_"), weights)(inputs)
        with torch.no_grad():
            expected = models[name](*inputs[:4], eager.keys, eager.values)
        for got, wanted in (
            (found, expected),
            (state.keys, eager.keys),
            (state.values, eager.values),
        ):
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
        state.starts += torch.tensor(counts)

    return run


def both(batch: int) -> tuple[State, State]:
    state = State(batch)
    eager = State(batch)
    eager.pages = state.pages
    return state, eager


@pytest.mark.parametrize("prefill", ["prefill rows", "prefill lanes"])
@pytest.mark.parametrize("counts", [[20], [33, 1, 17], [7, 8, 9, 0]])
def test_a_prompt_in_chunks_and_single_tokens(
    step: Callable[..., None], prefill: str, counts: list[int]
) -> None:
    """The cache carries the state from entry to entry, past pages and past the window."""
    state, eager = both(len(counts))
    step(prefill, state, eager, max(counts), counts)
    step(prefill, state, eager, 12, [12] * len(counts))
    for _ in range(3):
        step("decode", state, eager, 1, [1] * len(counts))
    assert bool(state.keys[1].any()) and not state.keys[0].any()


def test_many_rows_of_one_token(step: Callable[..., None]) -> None:
    """More tokens than the few that the example had."""
    state, eager = both(5)
    for _ in range(2):
        step("decode", state, eager, 1, [1, 1, 0, 1, 1])


def test_a_page_that_is_not_in_the_pool_is_an_error(compiled: Compiled) -> None:
    _, programs, executor = compiled
    program, state = programs["decode"], State(2)
    weights = [program.exported.state_dict[n] for n in program.weight_names.values()]
    state.pages[1, 0] = POOL
    with pytest.raises(IndexError, match="kv_append: an entry of the page table is no page"):
        executor.bind("decode", weights)(state.inputs(1, [1, 1]))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_operator_is_compiled(compiled: Compiled, name: str) -> None:
    nodes = [n for n in compiled[1][name].graph.nodes if n.op == "call_function"]
    assert {str(n.target): unsupported_reason(n) for n in nodes if unsupported_reason(n)} == {}


def calls(module: Any, start: str) -> int:
    return sum(v.name_hint.startswith(start) for v in module.functions)


def test_few_tokens_stay_row_major(compiled: Compiled) -> None:
    programs = compiled[1]
    module = lower({"decode": programs["decode"]}, Target.parse("x86-avx2"))
    assert calls(module, "paged_decode_") and calls(module, "rotary_rows_")
    assert not calls(module, "paged_prefill_")
    module = lower({"prefill": programs["prefill lanes"]}, Target.parse("x86-avx2"))
    assert calls(module, "paged_prefill_") and calls(module, "kv_append_lanes_")
    assert not calls(module, "paged_decode_")
