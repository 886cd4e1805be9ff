"""Elementary functions against float64, within the errors that their docstrings state."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import NEON, Isa
from sparsify.codegen.kernels.cpu import math as kernel_math
from sparsify.codegen.kernels.cpu.math import Vector
from sparsify.codegen.kernels.cpu.simd import Tensor, arguments, load, prim_func, store, symbol
from sparsify.ops import ACTIVATIONS

FUNCTIONS: dict[str, Callable[[Vector], Vector]] = {
    **{name: f for name, f in kernel_math.ACTIVATIONS.items() if name != "none"},
    "exp2": kernel_math.exp2,
    "sigmoid": kernel_math.sigmoid,
    "cubic": lambda x: kernel_math.polynomial(x, (2.0, -3.0, 0.5, 1.0)),
    "linear": lambda x: kernel_math.polynomial(x, (2.0, -3.0)),
}
REFERENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **ACTIVATIONS,
    "exp2": lambda x: torch.exp2(x.clamp(-126, 126)),
    "sigmoid": torch.sigmoid,
}
BLOCK = 16


@dataclass(frozen=True)
class Elementwise:
    """A kernel ``(x, y)`` that applies one function to vectors of ``width`` elements."""

    function: str
    isa: Isa
    width: int

    @property
    def name(self) -> str:
        return f"{self.function}_{self.width}"

    def build(self) -> Any:
        with prim_func(self.name) as result:
            blocks = symbol()
            x, y = arguments(Tensor("x", (blocks, BLOCK)), Tensor("y", (blocks, BLOCK)))
            with T.serial(blocks * (BLOCK // self.width)) as step:
                at = step * self.width
                value = FUNCTIONS[self.function](
                    Vector(load(x, at, self.width), self.width, self.isa)
                )
                store(y, at, value.value, self.width)
        return result[0]


@pytest.fixture(scope="module")
def library(width: Any, build: Callable[..., Any]) -> Any:
    kernels = [Elementwise(name, width.isa, width.isa.vector) for name in FUNCTIONS]
    kernels += [Elementwise(name, width.isa, 1) for name in ("gelu", "exp2")]
    return build(kernels, width.target)


@pytest.fixture
def apply(library: Any, width: Any) -> Callable[..., torch.Tensor]:
    """``apply(name, x)``: the function of each element."""

    def run(name: str, x: torch.Tensor, vector: int | None = None) -> torch.Tensor:
        blocks = F.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        kernel = Elementwise(name, width.isa, vector or width.isa.vector)
        return library(kernel, [blocks], blocks.shape).flatten()[: x.numel()]

    return run


def grid(low: float, high: float, count: int = 200_000) -> torch.Tensor:
    """An even grid, random points, and points around zero of every magnitude."""
    even = torch.linspace(low, high, count)
    drawn = torch.rand(count) * (high - low) + low
    tiny = torch.logspace(-44, 0, 2000)
    near = torch.cat([tiny, -tiny]).clamp(low, high)
    return torch.cat([even, drawn, near])


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    return REFERENCES[name](x.double())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs() / expected.abs()).max())


def absolute(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def test_exp2(apply: Callable[..., torch.Tensor]) -> None:
    x = grid(-126, 126)
    assert relative(apply("exp2", x), exact("exp2", x)) < 2.5e-7


def test_exp2_is_clamped(apply: Callable[..., torch.Tensor]) -> None:
    x = torch.tensor([-126.0, -127.0, -1e30, -math.inf, 126.0, 127.0, 1e30, math.inf])
    lowest, highest = 2.0**-126, 2.0**126
    expected = torch.tensor([lowest] * 4 + [highest] * 4)
    torch.testing.assert_close(apply("exp2", x), expected, rtol=2.5e-7, atol=0)


def test_gelu(apply: Callable[..., torch.Tensor]) -> None:
    x = grid(-8, 8)
    assert absolute(apply("gelu", x), exact("gelu", x)) < 1e-6
    x = grid(-1e4, 1e4)
    error = (apply("gelu", x) - exact("gelu", x)).abs()
    assert bool((error <= 1.5e-7 * x.abs().clamp_min(8)).all())


@pytest.mark.parametrize("name", ["gelu", "exp2"])
def test_one_element_at_a_time(apply: Callable[..., torch.Tensor], name: str) -> None:
    x = grid(-8, 8, 1000)
    expected = exact(name, x)
    error = (apply(name, x, vector=1) - expected).abs()
    assert bool((error <= 1e-6 * expected.clamp_min(1)).all())


@pytest.mark.parametrize(("name", "bound"), [("sigmoid", 2e-7), ("tanh", 3e-7)])
@pytest.mark.parametrize("limit", [1, 20, 100, 1e4])
def test_sigmoid_and_tanh(
    apply: Callable[..., torch.Tensor], name: str, bound: float, limit: float
) -> None:
    x = grid(-limit, limit)
    assert absolute(apply(name, x), exact(name, x)) < bound


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("limit", [1, 20, 100, 1e4])
def test_products_with_a_sigmoid(
    apply: Callable[..., torch.Tensor], name: str, limit: float
) -> None:
    x = grid(-limit, limit)
    error = (apply(name, x) - exact(name, x)).abs()
    assert bool((error <= 2e-7 * x.abs().clamp_min(1)).all())


def test_relu_is_exact(apply: Callable[..., torch.Tensor]) -> None:
    x = torch.cat([grid(-1e38, 1e38), torch.tensor([math.inf, -math.inf])])
    assert torch.equal(apply("relu", x), torch.relu(x))


@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_polynomials(apply: Callable[..., torch.Tensor], name: str) -> None:
    x = grid(-2, 2)
    coefficients = {"linear": (2.0, -3.0), "cubic": (2.0, -3.0, 0.5, 1.0)}[name]
    expected = torch.zeros(x.numel(), dtype=torch.float64)
    for coefficient in coefficients:
        expected = expected * x + coefficient
    assert absolute(apply(name, x), expected) < 1e-5


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_nan_stays_nan(apply: Callable[..., torch.Tensor], name: str) -> None:
    x = torch.randn(40)
    x[::3] = math.nan
    assert torch.equal(apply(name, x).isnan(), x.isnan())


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_rectifiers_at_the_extremes(apply: Callable[..., torch.Tensor], name: str) -> None:
    """The identity above; below, nothing next to the argument's own rounding."""
    zeros = apply(name, torch.tensor([0.0, -0.0, 1e-44, -1e-44]))
    assert float(zeros.abs().max()) <= 1e-44
    large = torch.tensor([30.0, 1e4, 1e10, 1e30, 3e38])
    torch.testing.assert_close(apply(name, large), large, rtol=2e-7, atol=0)
    assert bool((apply(name, -large).abs() <= 1.2e-7 * large).all())
    assert apply(name, torch.tensor([math.inf])).item() == math.inf


@pytest.mark.parametrize(("name", "low", "high"), [("sigmoid", 0.0, 1.0), ("tanh", -1.0, 1.0)])
def test_bounded_functions_at_the_extremes(
    apply: Callable[..., torch.Tensor], name: str, low: float, high: float
) -> None:
    large = torch.tensor([100.0, 1e10, 3e38, math.inf])
    torch.testing.assert_close(apply(name, large), torch.full((4,), high), rtol=0, atol=2e-7)
    torch.testing.assert_close(apply(name, -large), torch.full((4,), low), rtol=0, atol=2e-7)
    x = grid(-30, 30)
    found = apply(name, x)
    assert bool((found >= low).all()) and bool((found <= high).all())
    zeros = apply(name, torch.tensor([0.0, -0.0, 1e-44, -1e-44]))
    torch.testing.assert_close(zeros, torch.full((4,), (low + high) / 2), rtol=0, atol=0)


def test_neon_computes_on_vectors(assembly_for_neon: Callable[..., str]) -> None:
    assembly = assembly_for_neon([Elementwise(name, NEON, NEON.vector) for name in FUNCTIONS])
    assert "fmla\tv" in assembly
    assert "frintx\tv" in assembly
    assert "fmax\tv" in assembly and "bsl\tv" not in assembly
    assert not re.search(r"\tbl\t(rint|exp2?|pow|erf|tanh)f?\n", assembly), "calls the C library"
