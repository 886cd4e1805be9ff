"""Programs lowered, compiled and run at several sizes against eager PyTorch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsify.codegen.build import compile_library
from sparsify.codegen.lower import LoweringError, lower
from sparsify.codegen.runtime.executor import Executor
from sparsify.codegen.target import Target
from sparsify.frontend.torch import import_torch
from sparsify.layouts import parse
from sparsify.passes import run_pipeline
from sparsify.passes.canonicalize import Canonicalize
from sparsify.program import Program

OPS = torch.ops.sparsify
SELL, DENSE = "sell{rows=8,k_block=24,window=16}", "packed_dense{rows=6}"
SIZES = [(2, 5), (1, 1), (1, 16), (3, 7), (1, 33), (4, 31)]


class Linear(nn.Module):
    """A linear operator of ours, its packed weight in buffers."""

    def __init__(self, layout: str, out: int, features: int, activation: str = "none") -> None:
        super().__init__()
        weight = torch.randn(out, features) * (torch.rand(out, features) < 0.4) / features**0.5
        for name, tensor in parse(layout).pack(weight).items():
            self.register_buffer(name, tensor)
        self.names = tuple(parse(layout).tensors)
        self.fixed = (layout, out, features)
        self.bias = nn.Parameter(torch.randn(out))
        self.activation = activation

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self.names]

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, lanes: bool = False
    ) -> torch.Tensor:
        return OPS.sparse_linear(
            x, self.tensors, *self.fixed, self.bias, self.activation, residual, lanes
        )


class Rows(nn.Module):
    """Our operators on row-major activations, converted on the way in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear(SELL, 33, 40, "gelu"), Linear(DENSE, 40, 33)
        self.norm = nn.LayerNorm(40)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.down(self.up(x), x)
        return OPS.fused_norm(y, self.norm.weight, self.norm.bias, 1e-5), y


class Lanes(Rows):
    """The same network with activations in lanes throughout."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leading = list(x.shape[:2])
        x = OPS.to_lanes(x)
        y = self.down(self.up(x, lanes=True), x, lanes=True)
        normed = OPS.fused_norm(y, self.norm.weight, self.norm.bias, 1e-5, "layer", True)
        return OPS.from_lanes(normed, leading), OPS.from_lanes(y, leading)


class Active(nn.Module):
    """Linears whose inputs are mostly zero, and linears under a gate that mostly is."""

    def __init__(self) -> None:
        super().__init__()
        layouts = (SELL, DENSE, "dense")
        self.down = nn.ModuleList([Linear(layout, 40, 33, "silu") for layout in layouts])
        self.up = nn.ModuleList([Linear(layout, 33, 40) for layout in layouts])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate = F.relu(x[..., :33] - 0.5)
        inputs = gate * 2
        down = [
            OPS.active_linear(inputs, m.tensors, *m.fixed, 0.3, m.bias, m.activation, x)
            for m in self.down
        ]
        up = [OPS.gated_linear(x, gate, m.tensors, *m.fixed, 0.3, m.bias) for m in self.up]
        return (*down, *up)


class Gates(nn.Module):
    """Gated feed-forward networks whose gate runs in the linear's kernel, and not."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.straddling = Linear(SELL, 64, 40), Linear(SELL, 66, 40)
        self.shared = Linear(SELL, 32, 40)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leading, x = list(x.shape[:2]), OPS.to_lanes(x)
        both = self.shared(x, lanes=True)
        gated = [
            OPS.gated(self.whole(x, lanes=True), "silu", True),
            OPS.gated(self.straddling(x, lanes=True), "gelu", True),
            OPS.gated(both, "relu", True),
            both,
        ]
        return tuple(OPS.from_lanes(y, leading) for y in gated)


class Attention(nn.Module):
    """Two layers that share a mask, one of them in lanes."""

    def forward(self, qkv: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, _ = qkv.shape
        fixed = (2, 2, 8, [0, 16, 32], 0.4)
        mask = seen[:, None, None, :]
        rows = OPS.fused_attention(qkv, qkv, qkv, mask, *fixed, True)
        x = OPS.to_lanes(qkv)
        y = OPS.fused_attention(x, x, x, mask, *fixed, False, [batch, length, length])
        return rows, OPS.from_lanes(y, [batch, length])


class Biased(nn.Module):
    """Cross attention of grouped heads with a bias for each pair of positions."""

    def forward(self, q: torch.Tensor, kv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return OPS.fused_attention(q, kv, kv, bias, 4, 2, 4, [0, 0, 8], 0.5)


class Words(nn.Module):
    """Embeddings, slices by every kind of bound, and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 24), nn.Embedding(64, 24)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        length = ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(length))
        first, last = x[:, 0], x[:, -1]
        return x, first + last, x[:, 1:].sum(1), x[:, ::2].mean(1), x[:, -1:], x[..., 4:-2]


class Sizes(nn.Module):
    """Sums, and extents that are expressions: halves, remainders, products, minima."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, length, features = x.shape
        halves = x[:, : length // 2].sum(1) + x[:, length - length // 2 :].sum(1)
        flat = x.reshape(batch * length, features)
        return halves, flat.sum(0), x.transpose(0, 1).contiguous(), x[:, : length % 4], x.sum()


class Elementwise(nn.Module):
    """Operators that stay TVM's: broadcasts, reductions, logic, other dtypes."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = torch.sigmoid(x) * 2 - y.mean(1, keepdim=True)
        chosen = torch.where(x > y, z, torch.tanh(y))
        return (
            z,
            torch.softmax(chosen, -1),
            torch.maximum(x, y).sum(1),
            (x > 0) & (y > 0),
            x.long() + 1,
        )


@dataclass(frozen=True)
class Example:
    """Inputs of a batch and a length, and which of their dimensions vary together."""

    model: type[nn.Module]
    inputs: Callable[[int, int], tuple[torch.Tensor, ...]]
    dims: Any = "auto"

    def program(self, model: nn.Module) -> Program:
        """As it is lowered: imported, and in the spelling that TVM's importer reads rightly."""
        programs = import_torch(model.eval(), self.inputs(2, 8), dynamic_shapes=self.dims)
        return run_pipeline(programs, [Canonicalize()]).programs["forward"]


BATCH, LENGTH, KEYS = torch.export.Dim("b"), torch.export.Dim("s"), torch.export.Dim("t")
BOTH = {0: BATCH, 1: LENGTH}

EXAMPLES = {
    "rows": Example(Rows, lambda b, s: (torch.randn(b, s, 40),)),
    "lanes": Example(Lanes, lambda b, s: (torch.randn(b, s, 40),)),
    "active": Example(Active, lambda b, s: (torch.randn(b, s, 40),)),
    "gates": Example(Gates, lambda b, s: (torch.randn(b, s, 40),)),
    "attention": Example(
        Attention, lambda b, s: (torch.randn(b, s, 48), torch.rand(b, s) < 0.7), (BOTH, BOTH)
    ),
    "biased": Example(
        Biased,
        lambda b, s: (
            torch.randn(b, s, 16),
            torch.randn(b, s + 3, 16),
            torch.randn(1, 4, s, s + 3),
        ),
        (BOTH, {0: BATCH, 1: KEYS}, {2: LENGTH, 3: KEYS}),
    ),
    "words": Example(Words, lambda b, s: (torch.randint(50, (b, s)),)),
    "sizes": Example(Sizes, lambda b, s: (torch.randn(b, s, 12),)),
    "elementwise": Example(Elementwise, lambda b, s: (torch.randn(b, s, 9), torch.randn(b, s, 9))),
}

Compiled = tuple[dict[str, nn.Module], dict[str, Program], Executor]


def program_of(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Program:
    return import_torch(model.eval(), inputs)["forward"]


def weights_of(program: Program) -> list[torch.Tensor]:
    return [program.exported.state_dict[name] for name in program.weight_names.values()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """All models as entries of one library."""
    models = {name: example.model() for name, example in EXAMPLES.items()}
    programs = {name: example.program(models[name]) for name, example in EXAMPLES.items()}
    path = tmp_path_factory.mktemp("lower") / "models.so"
    compile_library(programs, Target.parse("native"), path)
    return models, programs, Executor(path, 2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_results_at_every_size(compiled: Compiled, name: str) -> None:
    models, programs, executor = compiled
    call = executor.bind(name, weights_of(programs[name]))
    for size in SIZES:
        inputs = EXAMPLES[name].inputs(*size)
        found = call(inputs)
        with torch.no_grad():
            expected = models[name](*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            print(f"output {i} at {size}")  # shown on failure
            torch.testing.assert_close(f, e, atol=2e-5, rtol=2e-5)


def test_an_index_outside_the_table_is_an_error(compiled: Compiled) -> None:
    _, programs, executor = compiled
    call = executor.bind("words", weights_of(programs["words"]))
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match="an index is outside the table of 50 rows"):
            call((torch.full((1, 4), wrong),))
    call((torch.zeros(1, 4, dtype=torch.int64),))


def kernel_names(module: Any, start: str) -> list[str]:
    return [v.name_hint for v in module.functions if v.name_hint.startswith(start)]


def test_entries_and_layers_share_kernels() -> None:
    one, two = (EXAMPLES["lanes"].program(Lanes()) for _ in range(2))
    once = lower({"one": one}, Target.parse("x86-avx2"))
    twice = lower({"one": one, "two": two}, Target.parse("x86-avx2"))
    for start in ("sell_", "dense_", "layer_norm_", "to_lanes_", "from_lanes_"):
        assert len(kernel_names(once, start)) == 1, start
        assert kernel_names(twice, start) == kernel_names(once, start)
    assert {"one", "two"} <= {v.name_hint for v in twice.functions}


def test_a_mask_is_prepared_once() -> None:
    class Masked(nn.Module):
        def forward(self, qkv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            fixed = (mask, 2, 2, 8, [0, 16, 32], 0.4)
            y = OPS.fused_attention(qkv, qkv, qkv, *fixed)
            return y + OPS.fused_attention(2 * qkv, qkv, qkv, *fixed)

    example = Example(
        Masked,
        lambda b, s: (torch.randn(b, s, 48), torch.rand(b, 1, 1, s) < 0.5),
        (BOTH, {0: BATCH, 3: LENGTH}),
    )
    module = lower({"one": example.program(Masked())}, Target.parse("x86-avx2"))
    (entry,) = (f for v, f in module.functions.items() if v.name_hint == "one")
    assert str(entry).count("attention_mask_bk_bool, ") == 1
    assert len(re.findall(r"attention_avx2_\w+, ", str(entry))) == 2


def test_an_operator_without_a_lowering_is_named() -> None:
    class Histogram(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.histc(x, 10)

    program = program_of(Histogram(), (torch.randn(4, 8),))
    with pytest.raises(LoweringError, match=r"node histc: no lowering for operator aten\.histc"):
        lower({"forward": program}, Target.parse("x86-avx2"))


def test_a_failed_lowering_names_node_shapes_and_cause() -> None:
    program = program_of(Linear("csr", 6, 40), (torch.randn(2, 8, 40),))
    with pytest.raises(LoweringError) as caught:
        lower({"forward": program}, Target.parse("x86-avx2"))
    message = str(caught.value)
    assert "node sparse_linear: operator sparsify.sparse_linear.default on" in message
    assert "40)" in message  # the shapes of its operands
    assert "no CPU kernel for layout 'csr'" in message


def test_a_missing_linker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    program = program_of(nn.ReLU(), (torch.randn(2, 3),))
    with pytest.raises(FileNotFoundError, match=r"'no-such-cc' is not on the PATH; install gcc"):
        compile_library({"forward": program}, Target.parse("native"), tmp_path / "relu.so")


def test_a_failed_link_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    program = program_of(nn.ReLU(), (torch.randn(2, 3),))
    with pytest.raises(RuntimeError):
        compile_library({"forward": program}, Target.parse("native"), tmp_path / "relu.so")
    assert list(tmp_path.iterdir()) == []


def test_programs_are_compiled_for_other_machines() -> None:
    program = EXAMPLES["lanes"].program(Lanes())
    module = lower({"forward": program}, Target.parse("arm64-neon"))
    assert kernel_names(module, "sell_neon") and not kernel_names(module, "sell_avx")


def test_gelu_of_torch_is_lowered_by_the_importer() -> None:
    """What no pass has fused still compiles."""

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gelu(x)

    assert lower({"forward": program_of(Plain(), (torch.randn(2, 3),))}, Target.parse("x86-avx2"))


def test_gates_run_in_the_kernels_of_linears_that_hold_both_halves() -> None:
    example = EXAMPLES["gates"]
    module = lower({"gates": example.program(example.model())}, Target.parse("native"))
    kernels = [variable.name_hint for variable in module.get_global_vars()]
    assert sum(name.startswith("gated_lanes_") for name in kernels) == 2
    assert sum(name.startswith("gated_sell_") for name in kernels) == 1
    assert not any(re.fullmatch(r"sell_\w+_64x40_\w+", name) for name in kernels)
