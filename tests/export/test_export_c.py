"""Exported C, built with the C compiler of its machine and run there or in an emulator of it."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.export.exported_net import LARGEST, SANITIZERS, check, inputs


@pytest.mark.isa("x86-avx2")
def test_under_sanitizers(folder: Path, host: Any, net: nn.Module) -> None:
    program = host.build(folder, flags=SANITIZERS)
    for sizes in ((1, 1), (3, 40), (2, 17), (1, 33)):
        check(host, program, net, sizes)


@pytest.mark.parametrize(
    "target",
    [
        "raspberry-pi/4b",
        "armv7-neon",
        "riscv64-rvv",
        "wasm-simd",
        pytest.param("riscv64", marks=pytest.mark.slow),
    ],
)
def test_on_other_machines(
    target: str, toolchain: Any, compiled: Any, net: nn.Module, tmp_path: Path
) -> None:
    there = toolchain(target)
    compiled.export_c(tmp_path, target=target, largest=LARGEST)
    program = there.build(tmp_path)
    for sizes in ((1, 1), (1, 33), (2, 17), (3, 40)):
        check(there, program, net, sizes)


@pytest.mark.isa("x86-avx2")
def test_on_two_threads(folder: Path, host: Any, net: nn.Module) -> None:
    program = host.build(
        folder, launch=("threads.c", "pool.c"), flags=("-std=gnu11", "-pthread", *SANITIZERS)
    )
    check(host, program, net, (3, 40), "--threads", "2", "--repeat", "20")


@pytest.mark.isa("x86-avx2")
def test_nothing_is_undefined_but_the_c_libraries(folder: Path, host: Any) -> None:
    program = host.build(folder)
    listed = subprocess.run(["nm", "-u", program], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines() if " U " in f" {line} "]
    assert names and [name for name in names if "@GLIBC_" not in name] == []


@pytest.mark.isa("x86-avx2")
def test_weights_are_an_object_of_their_size(folder: Path, host: Any) -> None:
    command = ["readelf", "-sW", host.build(folder)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    size, kind = next(line.split()[2:4] for line in listed.splitlines() if "model_weights" in line)
    assert int(size, 0) == (folder / "model.weights").stat().st_size and kind == "OBJECT"


CLOSE = """
import _ctypes, time
import numpy as np
from model import Model

model = Model("build/libmodel.so")
assert model._library.sparsify_set_threads(2) == 0
model(np.zeros((3, 40, 48), "f4"), np.zeros((3, 40), "f4"))
_ctypes.dlclose(model._library._handle)
time.sleep(0.05)
"""


CPP = """
#include <cstdio>
#include "model.hpp"

int main() {
  model::Model net;
  for (int i = 0; i < 2; ++i) {
    sparsify_tensor &input = net.input(i);
    input.shape[0] = 1;
    input.shape[1] = 2;
    for (int j = 0; j < 2 * (i ? 1 : 48); ++j) model::Model::data<float>(input)[j] = 0.5f;
  }
  const sparsify_tensor &scores = net.run()[MODEL_OUT_SCORES];
  float total = 0;
  for (int j = 0; j < 34; ++j) total += model::Model::data<float>(scores)[j];
  std::printf("%lld %.4f\\n", static_cast<long long>(scores.shape[1]), total);
  try {
    model::Model other(1);
  } catch (const std::out_of_range &error) {
    std::puts(error.what());
  }
  net.input(0).shape[0] = 9;
  try {
    net.run();
  } catch (const std::runtime_error &error) {
    std::puts(error.what());
  }
}
"""


@pytest.mark.isa("x86-avx2")
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_cmake_and_the_wrappers(folder: Path, host: Any, net: nn.Module) -> None:
    """As a user builds it: the program, and a shared library for Python; then C++."""
    build = folder / "build"
    options = ["-DMODEL_SHARED=ON", "-DCMAKE_BUILD_TYPE=Release", "-DSPARSIFY_THREADS=ON"]
    for command in (["cmake", "-S", folder, "-B", build, *options], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(build / "model_main", folder / "model_main")
    check(host, folder / "model_main", net, (2, 5))

    spec = importlib.util.spec_from_file_location("exported", folder / "model.py")
    assert spec is not None and spec.loader is not None
    wrapper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrapper)
    x, keep = inputs(2, 9)
    for model in (
        wrapper.Model(str(build / "libmodel.so")),
        wrapper.Model(str(build / "libmodel.so"), str(folder / "model.weights")),
    ):
        found = model(x.numpy(), keep.numpy())
        for name, wanted in net(x, keep).items():
            assert np.abs(found[name] - wanted.detach().numpy()).max() < 1e-5
        with pytest.raises(ValueError, match="input 'x' has a size out of its range"):
            model(np.zeros((4, 9, 48), "f4"), np.zeros((4, 9), "f4"))

    done = subprocess.run([sys.executable, "-c", CLOSE], cwd=folder, check=False)
    assert done.returncode == 0, "threads outlived the library's code"

    (folder / "use.cpp").write_text(CPP)
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "use.cpp"]
    libraries = ["build/libmodel.a", "build/libsparsify_runtime.a", "-pthread"]
    subprocess.run([*command, *libraries, "-o", "use"], cwd=folder, check=True)
    said = subprocess.run([folder / "use"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "2 2.0000",
        "model has no such entry",
        "input 'x' has a size out of its range",
    ]


@pytest.mark.isa("x86-avx2")
def test_sizes_of_the_examples_are_the_largest(product: tuple[nn.Module, Path], host: Any) -> None:
    module, folder = product
    header = (folder / "product.h").read_text()
    assert ": 1 to 20\n" in header and ": 1 to 2\n" in header
    program = host.build(folder, "product")
    x = torch.randn(2, 20, 48)
    np.save(folder / "x.npy", x.numpy())
    host.run(program, "x.npy", "-o", "y.npy")
    np.testing.assert_allclose(np.load(folder / "y.npy"), module(x).detach(), atol=1e-5)

    def refused(message: str, *arguments: str) -> None:
        done = host.run(program, *arguments, "x.npy", check=False)
        assert done.returncode == 1 and done.stderr.endswith(f"{message}\n")

    refused("none: the file cannot be read", "--weights", "none")
    np.save(folder / "x.npy", np.zeros((2, 21, 48), "f4"))
    refused("run: input 'x' has a size out of its range")
    large = (folder / "x.npy").read_bytes().replace(b"(2, ", b"(9223372036854775807, ")
    (folder / "x.npy").write_bytes(large)
    refused("x.npy: is larger than memory")
