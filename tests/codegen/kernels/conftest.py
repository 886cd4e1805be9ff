"""Kernels built by the dozen and run by hand.

Every tensor lies in a larger one filled with NaN, so that reads past its end show in the result and
writes past the end of the output are found. Outputs and the unused lanes of inputs are NaN too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import tvm

from sparsify.codegen.build import build_kernels
from sparsify.codegen.isa import AVX2, AVX512, NEON, Isa
from sparsify.codegen.registry import Kernel
from sparsify.codegen.runtime import pool
from sparsify.codegen.target import Target
from sparsify.layouts import LANES
from sparsify.ops import from_lanes, sparse_linear

GUARD = 64
"""Floats before and after each tensor."""

TOKENS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100)
EPSILON = 2.0**-23


@dataclass(frozen=True)
class Width:
    """One width of vectors, with a target that this kind of machine runs."""

    isa: Isa
    target: Target


WIDTHS = {
    "avx512": Width(AVX512, Target.parse("x86-avx512")),
    "avx2": Width(AVX2, Target.parse("x86-avx2")),
    # ARM's template runs here as well, compiled for x86, but for an instruction that LLVM has for
    # ARM alone.
    "neon": Width(replace(NEON, vectors_per_load=1), Target.parse("x86-avx2")),
}


class Library:
    """Kernels compiled into one shared library, on our thread pool."""

    def __init__(self, kernels: Iterable[Kernel], target: Target, path: Path) -> None:
        build_kernels(kernels, target).export_library(str(path))
        self._module = tvm.runtime.load_module(str(path))
        pool.redirect(path)

    def __call__(
        self,
        kernel: Kernel,
        inputs: Sequence[Any],
        shape: Sequence[int],
        threads: Iterable[int] = (1,),
        dtype: torch.dtype = torch.float32,
        changes: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """What the kernel writes into a tensor of ``shape``, the same with each thread count.

        Inputs are tensors and integers; None, an operand the kernel does not have, is left out.
        Those in ``changes`` are changed as the kernel changes them, the others it must leave alone.
        """
        given = [x for x in inputs if x is not None]
        results = []
        for count in threads:
            tensors = {i: _guarded(x) for i, x in enumerate(given) if isinstance(x, torch.Tensor)}
            whole, y = _guarded(torch.full(tuple(shape), _fill(dtype), dtype=dtype))
            arguments = [tensors[i][1] if i in tensors else x for i, x in enumerate(given)]
            written = {i for i in tensors if any(given[i] is x for x in changes)}
            try:
                with pool.use_threads(count):
                    self._module[kernel.name](*map(_argument, [*arguments, y]))
            except Exception:
                for i in written:
                    given[i].copy_(tensors[i][1])
                raise
            for i in tensors.keys() - written:
                assert _same_bytes(given[i], tensors[i][1]), f"{kernel.name}: changed an input"
            results.append([_taken(kernel, *tensors[i]) for i in sorted(written)])
            results[-1].append(_taken(kernel, whole, y))
        for result in results[1:]:
            same = all(map(_same_bytes, results[0], result))
            assert same, f"{kernel.name}: threads change the result"
        for i, result in zip(sorted(written), results[0][:-1], strict=True):
            given[i].copy_(result)
        return results[0][-1]


def _fill(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else 1


def _taken(kernel: Kernel, whole: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """A copy of what a kernel wrote, once it is clear that it wrote nothing around it."""
    result = inside.clone()
    inside.fill_(_fill(inside.dtype))
    untouched = whole.isnan() if whole.is_floating_point() else whole == 1
    where = f"outside a tensor of {tuple(inside.shape)}"
    assert bool(untouched.all()), f"{kernel.name}: wrote {where}"
    return result


def _argument(value: Any) -> Any:
    return tvm.runtime.from_dlpack(value) if isinstance(value, torch.Tensor) else value


def _guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the larger tensor, a copy inside it that is aligned as kernels need)."""
    size = tensor.element_size()
    count = tensor.numel() + 2 * GUARD + 64
    whole = torch.full((count,), _fill(tensor.dtype), dtype=tensor.dtype)
    skip = GUARD + (-(whole.data_ptr() + GUARD * size) % 64) // size
    inside = whole[skip : skip + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return whole, inside


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("avx512", marks=pytest.mark.isa("x86-avx512")),
        pytest.param("avx2", marks=pytest.mark.isa("x86-avx2")),
        pytest.param("neon", marks=pytest.mark.isa("x86-avx2")),
    ],
)
def width(request: pytest.FixtureRequest) -> Width:
    return WIDTHS[request.param]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Library]:
    """``build(kernels, target)``: all of them in one library."""

    def run(kernels: Iterable[Kernel], target: Target) -> Library:
        return Library(kernels, target, tmp_path_factory.mktemp("kernels") / "kernels.so")

    return run


@pytest.fixture(scope="session")
def assembly_for_neon(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``assembly_for_neon(kernels)``: their ARM assembly, after an object file was written."""

    def run(kernels: Iterable[Kernel]) -> str:
        path = tmp_path_factory.mktemp("neon") / "kernels.o"
        library = build_kernels(kernels, Target.parse("arm64-neon")).mod
        library.write_to_file(str(path), "o")
        header = path.read_bytes()[:20]
        assert header[:4] == b"\x7fELF"
        assert int.from_bytes(header[18:20], "little") == 0xB7, "not an AArch64 object"
        return str(library.inspect_source("asm"))

    return run


@pytest.fixture(scope="session")
def lanes() -> Callable[[torch.Tensor], torch.Tensor]:
    """``[..., features]`` in lanes, with NaN in the unused ones."""

    def convert(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows = F.pad(rows, (0, 0, 0, -rows.shape[0] % LANES), value=math.nan)
        return rows.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()

    return convert


@pytest.fixture(scope="session")
def check_rows() -> Callable[..., None]:
    """Runs a linear kernel for few tokens, row-major, and compares with float64."""
    return _check_linear(lambda x: x, lambda tokens, features: (tokens, features), lambda y, _: y)


@pytest.fixture(scope="session")
def check_linear(lanes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """Runs a linear kernel in lanes on random activations and compares with float64."""
    return _check_linear(
        lanes,
        lambda tokens, features: (-(-tokens // LANES), features, LANES),
        lambda y, tokens: from_lanes.reference(y, (tokens,)),
    )


def _check_linear(
    enter: Callable[[torch.Tensor], torch.Tensor],
    shape_of: Callable[[int, int], Sequence[int]],
    leave: Callable[[torch.Tensor, int], torch.Tensor],
) -> Callable[..., None]:
    def check(
        library: Library,
        kernel: Any,
        weight: torch.Tensor,
        tokens: int,
        threads: Sequence[int] = (1,),
        scale: float = 1.0,
    ) -> None:
        epilogue = kernel.epilogue
        out_features, in_features = weight.shape
        x = scale * torch.randn(tokens, in_features)
        bias = torch.randn(out_features) if epilogue.bias else None
        residual = torch.randn(tokens, out_features) if epilogue.residual else None
        packed = kernel.layout.pack(weight)
        inputs = [enter(x), *packed.values(), bias, None if residual is None else enter(residual)]
        y = library(kernel, inputs, shape_of(tokens, out_features), threads)
        found = leave(y, tokens)
        expected = sparse_linear.reference(
            x.double(), [weight.double()], "dense", out_features, in_features,
            _double(bias), epilogue.activation, _double(residual),
        )  # fmt: skip
        error = (found - expected).abs()
        allowed = _allowed(x, weight, bias, residual, epilogue.activation, expected)
        worst = int((error / allowed).nan_to_num(math.inf).argmax())
        assert bool((error <= allowed).all()), (
            f"{kernel.name} at {tokens} tokens: element {divmod(worst, out_features)} is "
            f"{found.flatten()[worst]} instead of {expected.flatten()[worst]}"
        )

    return check


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


def _allowed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    expected: torch.Tensor,
) -> torch.Tensor:
    """A bound on fp32's rounding that holds for any order of the sum, and the activation's error.

    No activation is steeper than 1.13.
    """
    total = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        total = total + bias.double().abs()
    allowed = 1.13 * EPSILON * (weight.shape[1] + 2) * total + 2 * EPSILON * expected.abs()
    if activation not in ("none", "relu"):
        allowed = allowed + 4e-7 * total.clamp_min(5.0)
    if residual is not None:
        allowed = allowed + 2 * EPSILON * residual.double().abs()
    return allowed + 1e-37
