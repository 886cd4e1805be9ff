"""Compiled entries called from threads, on awkward inputs, and after errors."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify.codegen.build import compile_library
from sparsify.codegen.runtime.executor import Entry, Executor, aligned
from sparsify.codegen.target import Target
from sparsify.frontend.torch import import_torch
from sparsify.layouts import Sell
from sparsify.program import Program

FEATURES = 24


class Layer(nn.Module):
    """A sparse linear operator and what TVM schedules around it."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(FEATURES, FEATURES) * (torch.rand(FEATURES, FEATURES) < 0.3)
        for name, tensor in Sell(8, 16, 24).pack(weight).items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = [self.starts, self.outputs, self.columns, self.values]
        spec = Sell(8, 16, 24).spec
        y = torch.ops.sparsify.sparse_linear(x, weight, spec, FEATURES, FEATURES, None, "silu")
        return torch.sin(y) + x


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer().eval()


@pytest.fixture(scope="module")
def program(layer: Layer) -> Program:
    return import_torch(layer, (torch.randn(3, 5, FEATURES),))["forward"]


@pytest.fixture(scope="module")
def library(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("executor") / "layer.so"
    compile_library({"forward": program}, Target.parse("native"), path)
    return path


def weights_of(program: Program) -> list[torch.Tensor]:
    return [program.exported.state_dict[name] for name in program.weight_names.values()]


@pytest.fixture
def call(program: Program, library: Path) -> Entry:
    return Executor(library, 2).bind("forward", weights_of(program))


def assert_right(layer: Layer, x: torch.Tensor, found: tuple[torch.Tensor, ...]) -> None:
    (y,) = found
    with torch.no_grad():
        torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)


def test_threads_with_inputs_of_their_own(layer: Layer, call: Entry) -> None:
    errors: list[BaseException] = []
    ready = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            inputs = [torch.randn(i + 1, s, FEATURES) for s in (1, 7, 16, 40)]
            ready.wait(60)
            for _ in range(25):
                for x in inputs:
                    assert_right(layer, x, call((x,)))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    assert errors == []


def test_threads_of_one_call_do_not_change_its_result(program: Program, library: Path) -> None:
    x = torch.randn(3, 33, FEATURES)
    results = [
        Executor(library, n).bind("forward", weights_of(program))((x,))[0] for n in (1, 2, 3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_calls_leave_no_threads_behind(program: Program, library: Path, call: Entry) -> None:
    x = torch.randn(2, 40, FEATURES)

    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    call((x,))
    before = count()
    for _ in range(20):
        caller = threading.Thread(target=call, args=((x,),))
        caller.start()
        caller.join(60)
        Executor(library, 2).bind("forward", weights_of(program))((x,))
    deadline = threading.Event()
    for _ in range(100):  # join returns a moment before the thread is gone
        if count() <= before:
            break
        deadline.wait(0.05)
    assert count() <= before


@pytest.mark.parametrize(
    "awkward",
    [
        lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),  # misaligned
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., :FEATURES],
        lambda x: x[:1].expand(x.shape),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["misaligned", "transposed", "part of rows", "expanded", "requires grad"],
)
def test_inputs_as_they_come(layer: Layer, call: Entry, awkward: object) -> None:
    x = awkward(torch.randn(3, 5, FEATURES))  # type: ignore[operator]
    before = x.detach().clone()
    assert_right(layer, x, call((x,)))
    assert torch.equal(x, before)


def test_misaligned_weights_are_copied(layer: Layer, program: Program, library: Path) -> None:
    def moved(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)

    call = Executor(library, 1).bind("forward", [moved(w) for w in weights_of(program)])
    x = torch.randn(2, 3, FEATURES)
    assert_right(layer, x, call((x,)))


def test_only_what_kernels_cannot_read_is_copied() -> None:
    x = torch.randn(64, 48)
    assert aligned(x) is x
    for awkward in (x.t(), x.flatten()[1:], x[:, :16]):
        copied = aligned(awkward)
        assert torch.equal(copied, awkward)
        assert copied.data_ptr() % 64 == 0
        assert copied.is_contiguous()


def test_a_result_outlives_later_calls(layer: Layer, call: Entry) -> None:
    inputs = [torch.randn(2, 9, FEATURES) for _ in range(8)]
    results = [call((x,)) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert_right(layer, x, result)


def test_a_wrong_input_is_refused_and_the_next_call_works(layer: Layer, call: Entry) -> None:
    for wrong in (torch.randn(2, 3, FEATURES + 1), torch.randn(2, FEATURES)):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            call((wrong,))
    x = torch.randn(2, 3, FEATURES)
    assert_right(layer, x, call((x,)))


def test_an_empty_batch_has_an_empty_result(call: Entry) -> None:
    (y,) = call((torch.randn(0, 3, FEATURES),))
    assert y.shape == (0, 3, FEATURES)
