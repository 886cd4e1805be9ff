"""State in exported C: what a model changes in place, and results that become the next inputs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsify
from sparsify.bench.foreign import Device
from sparsify.codegen.emit.c.state import StateTensor
from tests.export.exported_net import SANITIZERS


class Filter(nn.Module):
    """Two states, one of which swaps into the other, and a result that is a state too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(24, 16)

    def forward(
        self, x: torch.Tensor, h: torch.Tensor, before: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        new = torch.tanh(self.mix(torch.cat([x, h], -1)))
        return {"y": new + before, "new": new, "old": h * 1.0}


@pytest.fixture(scope="module")
def filter_() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = Filter().eval()
    examples = (torch.randn(3, 8), torch.randn(3, 16), torch.randn(3, 16))
    rows = {0: torch.export.Dim.AUTO}
    return net, sparsify.compile(net, examples, dynamic_shapes=(rows, rows, rows))


STATE = {"h": "new", "before": "old"}


def wrapper(folder: Path) -> Any:
    """The exported folder's own wrapper for Python."""
    build = folder / "build"
    for command in (
        ["cmake", "-S", folder, "-B", build, "-DMODEL_SHARED=ON"], ["cmake", "--build", build]
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    spec = importlib.util.spec_from_file_location("stateful", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(str(build / "libmodel.so"))


class Here(Device):
    """This machine, without ssh."""

    def _do(self, command: str, given: bytes = b"") -> str:
        done = subprocess.run(["sh", "-c", command], input=given, capture_output=True, check=True)
        return done.stdout.decode()


@pytest.mark.isa("x86-avx2")
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_results_that_are_the_next_inputs(filter_: tuple[nn.Module, Any], tmp_path: Path) -> None:
    """And the wrapper's reset."""
    net, compiled = filter_
    compiled.export_c(tmp_path, target="x86-avx2", state=STATE)
    header = (tmp_path / "model.h").read_text()
    assert "float *h; /* float32 [3, 16] */" in header
    model = wrapper(tmp_path)
    for _ in range(2):
        h, before = torch.zeros(3, 16), torch.zeros(3, 16)
        for _ in range(4):
            x = torch.randn(3, 8)
            wanted = net(x, h, before)
            found = model(x.numpy())
            assert list(found) == ["y"]
            np.testing.assert_allclose(found["y"], wanted["y"].detach(), atol=1e-5)
            h, before = wanted["new"].detach(), wanted["old"].detach()
        model.reset()
    with pytest.raises(ValueError, match="input 'x' has a size out of its range"):
        model(np.zeros((2, 8), "f4"))  # the state is for three rows
    np.save(tmp_path / "x.npy", np.zeros((3, 8), "f4"))
    times = Here("here").time(tmp_path, ["x.npy"], 3)
    assert len(times) == 3 and min(times) > 0


class Delay(nn.Module):
    """Next values of its states are an input, a state and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.randn(3, 8))

    def forward(
        self, x: torch.Tensor, one: torch.Tensor, two: torch.Tensor, three: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        y = x + one + two + three
        return {"y": y, "x": x, "sum": y, "one": one, "last": self.last, "same": x}


@pytest.mark.isa("x86-avx2")
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_next_values_that_nothing_computes_and_first_ones(tmp_path: Path) -> None:
    net = Delay().eval()
    compiled = sparsify.compile(net, tuple(torch.randn(4, 3, 8)), dynamic_shapes=None)
    first = torch.randn(8)
    compiled.export_c(
        tmp_path,
        target="x86-avx2",
        state={"one": "x", "two": "one", "three": "last"},
        initial={"one": first.numpy(), "three": -2},
    )
    model = wrapper(tmp_path)
    for _ in range(2):
        one, two, three = first.expand(3, 8), torch.zeros(3, 8), torch.full((3, 8), -2.0)
        for _ in range(3):
            x = torch.randn(3, 8)
            wanted = {k: v.detach().numpy() for k, v in net(x, one, two, three).items()}
            found = model(x.numpy())
            assert list(found) == ["y", "same"]  # "sum" is y, which is written once
            np.testing.assert_allclose(found["y"], wanted["y"], atol=1e-6)
            np.testing.assert_array_equal(found["same"], x)
            one, two, three = x, one, net.last.detach()
        model.reset()


class Counter(nn.Module):
    def forward(self, h: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"new": h * 2 + 1}


COUNT = """
#include <stdio.h>
#include "model.h"

static _Alignas(64) unsigned char workspace[MODEL_WORKSPACE_BYTES], memory[MODEL_STATE_BYTES];

int main(void) {
  model_state state;
  printf("%d ", model_state_init(&state, memory, sizeof memory));
  printf("%s\\n", model_last_error());
  model_init(model_weights, MODEL_WEIGHTS_BYTES);
  model_state_init(&state, memory, sizeof memory);
  for (int i = 0; i < 3; ++i)
    printf("%d ", model_run(NULL, NULL, &state, workspace, sizeof workspace));
  printf("%g %g\\n", state.h[0], state.h[4]);
  printf("%d ", model_run(NULL, NULL, &state, memory, sizeof workspace));
  printf("%s\\n", model_last_error());
  return 0;
}
"""


COUNT_CPP = """
#include "model.hpp"

int main() {
  model::Model net;
  net.run();
  net.reset();
  return net.state().h[0] == 0.5f ? 0 : 1;
}
"""


@pytest.fixture(scope="module")
def counter() -> Any:
    return sparsify.compile(Counter(), (torch.zeros(5),))


@pytest.mark.isa("x86-avx2")
def test_an_entry_of_nothing_but_state(counter: Any, host: Any, tmp_path: Path) -> None:
    counter.export_c(tmp_path, target="x86-avx2", state={"h": "new"}, initial={"h": 0.5})
    (tmp_path / "count.c").write_text(COUNT)
    program = host.build(tmp_path, sources=("count.c",), flags=SANITIZERS)
    assert host.run(program).stdout.splitlines() == [
        "6 the model was not initialised",
        "0 0 0 11 11",
        "8 the workspace overlaps the state",
    ]
    host.run(host.build(tmp_path, flags=SANITIZERS), "--repeat", 2)
    (tmp_path / "count.cpp").write_text(COUNT_CPP)
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "count.cpp"]
    subprocess.run([*command, "-fsyntax-only"], cwd=tmp_path, check=True)


def test_what_cannot_be_state(filter_: tuple[nn.Module, Any], tmp_path: Path) -> None:
    _, compiled = filter_

    def refused(message: str, initial: Any = None, **state: str) -> None:
        with pytest.raises(ValueError, match=message):
            compiled.export_c(tmp_path / "none", target="x86-avx2", state=state, initial=initial)
        assert not (tmp_path / "none").exists()

    refused("has no input 'g'; its inputs are x, h, before", g="new")
    refused("has no result 'newer'; its results are y, new, old", h="newer")
    refused(r"a state of float32 .* cannot become float32 .*", x="new")
    refused("initial names h, but the state of the model is empty; say what", {"h": 1.0})
    refused("initial names g, but the state of the model is h, before", {"g": 1.0}, **STATE)
    begins = r"state 'h' is float32 \[3, 16\] and cannot begin as "
    refused(begins + r"float32 \[3\]", {"h": torch.zeros(3)}, **STATE)
    refused(begins + r"complex64 \[\]", {"h": torch.tensor(1j)}, **STATE)


@pytest.mark.isa("x86-avx2")
def test_an_export_that_fails_leaves_what_was_there(
    counter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "own.txt").write_text("the user's")
    counter.export_c(folder, target="x86-avx2")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert before["own.txt"] == b"the user's" and b"WORKSPACE_BYTES 64\n" in before["model.h"]

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("sparsify.codegen.emit.c.weights.Weights.write", full)
    with pytest.raises(OSError, match="no space left"):
        counter.export_c(folder, target="x86-avx512", state={"h": "new"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.isa("x86-avx2")
def test_a_folder_of_another_file_system(counter: Any, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        (tmp_path / "c").symlink_to(elsewhere)
        counter.export_c(tmp_path / "c", target="x86-avx2")
        assert Path(elsewhere, "model.h").exists()
        assert not [path for path in Path(elsewhere).iterdir() if path.is_dir()]


def test_what_a_target_cannot_address_is_refused(
    filter_: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    _, compiled = filter_
    most = 30_000_000
    largest = {"x": (most, 8), "h": (most, 16), "before": (most, 16)}
    message = (
        r"more than the 2 GiB that programs for 'armv7-neon' can use, with s\d+ = 30000000: .*"
    )
    with pytest.raises(ValueError, match=message + "inputs and outputs 10,"):
        compiled.export_c(tmp_path / "none", target="armv7-neon", largest=largest)
    assert not (tmp_path / "none").exists()


def test_members_have_names_that_c_takes() -> None:
    names = {"h": "h", "memory": "memory_", "new": "new_"}
    for name, member in names.items():
        assert StateTensor(name, "float32", (1,), 0, 4).member == member
