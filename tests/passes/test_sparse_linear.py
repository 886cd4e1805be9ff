"""Linears get canonical storage: CSR where there are zeros, the dense matrix elsewhere."""

import pytest
import torch
from torch import nn

from sparsify.layouts import parse
from sparsify.passes.sparse_linear import SparseLinear, percent


def prune(weight: torch.Tensor, density: float) -> None:
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < density
    with torch.no_grad():
        weight.mul_(keep)


class Product(nn.Module):
    """``x`` times a constant matrix of 5 inputs and 7 outputs, in one of torch's spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        rows = spelling in ("linear", "matmul_transposed", "mm_t")
        self.weight = nn.Parameter(torch.randn(7, 5) if rows else torch.randn(5, 7))
        self.bias = nn.Parameter(torch.randn(7))
        prune(self.weight, 0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.spelling:
            case "linear":
                return nn.functional.linear(x, self.weight, self.bias)
            case "addmm":
                return torch.addmm(self.bias, x, self.weight)
            case "mm":
                return torch.mm(x, self.weight)
            case "matmul":
                return x @ self.weight
            case "matmul_transposed":
                return x @ self.weight.transpose(0, 1)
            case _:
                return torch.mm(x, self.weight.t())


@pytest.mark.parametrize(
    "spelling", ["linear", "addmm", "mm", "matmul", "matmul_transposed", "mm_t"]
)
def test_every_spelling_becomes_one_operator(spelling, import_model, apply, targets, same_results):
    model = Product(spelling)
    result = apply(import_model(model, torch.randn(3, 5)), SparseLinear())
    program = result.programs["forward"]
    assert targets(program)["sparse_linear"] == 1
    assert not set(targets(program)) & {"linear", "addmm", "mm", "matmul"}
    same_results(model, program, [(torch.randn(n, 5),) for n in (1, 2, 17)])
    (decision,) = result.decisions
    assert decision.verdict == "sparse" and decision.layout == "csr" and decision.shape == (7, 5)
    assert decision.density == int((model.weight != 0).sum()) / 35
    assert decision.bytes_dense == 140


def test_csr_tensors_replace_the_dense_weight(import_model, apply):
    model = Product("linear")
    programs = import_model(model, torch.randn(3, 5))
    (entry,) = apply(programs, SparseLinear()).programs
    assert sorted(entry.weights) == [
        "bias",
        "weight:csr.columns",
        "weight:csr.offsets",
        "weight:csr.values",
    ]
    packed = {name: entry.weights[f"weight:csr.{name}"] for name in parse("csr").tensors}
    assert torch.equal(parse("csr").unpack(packed, (7, 5)), model.weight)
    assert "weight" in programs.weights


def test_weight_without_zeros_stays_dense(import_model, apply):
    result = apply(import_model(nn.Linear(5, 7), torch.randn(3, 5)), SparseLinear())
    (decision,) = result.decisions
    assert (decision.verdict, decision.layout, decision.density) == ("dense", "dense", 1.0)
    assert "100% nonzero" in decision.reason
    assert sorted(result.programs.weights) == ["bias", "weight"]


@pytest.mark.parametrize(("limit", "layout"), [(0.3, "dense"), (0.5, "csr")])
def test_the_density_limit_is_an_option(limit, layout, import_model, apply):
    model = nn.Linear(20, 30)
    prune(model.weight, 0.4)
    programs = import_model(model, torch.randn(3, 20))
    (decision,) = apply(programs, SparseLinear(max_density=limit)).decisions
    assert decision.layout == layout


def test_an_all_zero_weight_is_stored_empty(import_model, apply, same_results):
    model = nn.Linear(5, 7)
    nn.init.zeros_(model.weight)
    result = apply(import_model(model, torch.randn(3, 5)), SparseLinear())
    assert result.programs.weights["weight:csr.values"].numel() == 0
    same_results(model, result.programs["forward"], [(torch.randn(9, 5),)])


def test_tied_linears_share_one_csr(import_model, apply, targets):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            prune(self.first.weight, 0.4)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    result = apply(import_model(Tied(), torch.randn(3, 6)), SparseLinear())
    assert targets(result.programs["forward"])["sparse_linear"] == 2
    packed = [name for name in result.programs.weights if ":csr." in name]
    assert len(packed) == 3


def test_weight_shared_with_an_embedding_stays(import_model, apply, same_results):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            prune(self.embedding.weight, 0.4)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids))

    model = Head()
    result = apply(import_model(model, torch.tensor([[1, 2, 3], [4, 5, 6]])), SparseLinear())
    shapes = {tuple(t.shape) for t in result.programs.weights.values()}
    assert (11, 6) in shapes
    assert any(":csr." in name for name in result.programs.weights)
    same_results(model, result.programs["forward"], [(torch.tensor([[10]]),)])


class LeftConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight @ x.transpose(0, 1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight, alpha=2)


class MatrixBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(LeftConstant(), "left operand"), (Scaled(), "alpha=2"), (MatrixBias(), "bias has shape")],
)
def test_near_misses_say_why(model, reason, import_model, apply, targets):
    result = apply(import_model(model, torch.randn(3, 5)), SparseLinear())
    (decision,) = result.decisions
    assert decision.verdict == "skipped" and reason in decision.reason
    assert targets(result.programs["forward"])["sparse_linear"] == 0


def test_products_of_two_activations_are_no_site(import_model, apply, targets):
    class Gram(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.transpose(0, 1)

    result = apply(import_model(Gram(), torch.randn(3, 5)), SparseLinear())
    assert result.decisions == () and targets(result.programs["forward"])["sparse_linear"] == 0


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.2, "20%"), (1.0, "100%"), (0.004, "0.4%"), (0.9951, "99.5%"), (0, "0%")],
)
def test_percent_hides_nothing(fraction, text):
    assert percent(fraction) == text
