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

import sparsify

LARGEST = {"x": (3, 40, 48), "keep": (3, 40)}
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class Net(nn.Module):
    """Attention, a sparse and a dense layer, norms; two inputs that share sizes, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)
        self.up = nn.Linear(48, 96)
        self.down = nn.Linear(96, 17)
        self.norm = nn.LayerNorm(48)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        h = self.norm(x + attended.transpose(1, 2).flatten(2))
        scores = self.down(nn.functional.gelu(self.up(h)))
        return {"scores": torch.softmax(scores, -1), "kept": h * keep.unsqueeze(-1)}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    return sparsify.prune(model, sparsify.Unstructured(0.8, skip=("qkv",)))


@pytest.fixture(scope="module")
def compiled(net: nn.Module) -> Any:
    return sparsify.compile(net, (torch.randn(2, 20, 48), torch.ones(2, 20)))


@pytest.fixture(scope="module")
def folder(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The net as C for x86."""
    path = tmp_path_factory.mktemp("c")
    compiled.export_c(path, target="x86-avx2", largest=LARGEST)
    return path


def inputs(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, seq, 48), torch.rand(batch, seq)


def check(
    toolchain: Any, program: Path, net: nn.Module, sizes: tuple[int, int], *more: str
) -> None:
    """Runs the program on fresh numbers and compares with PyTorch in float64."""
    given = inputs(*sizes)
    expected = net.double()(*(x.double() for x in given))
    net.float()
    for name, x in zip(("x", "keep"), given, strict=True):
        np.save(program.with_name(f"{name}.npy"), x.numpy())
    toolchain.run(program, *more, "x.npy", "keep.npy", "-o", "scores.npy", "kept.npy")
    for name, wanted in expected.items():
        found = np.load(program.with_name(f"{name}.npy"))
        assert found.dtype == np.float32 and found.shape == wanted.shape
        assert np.abs(found - wanted.detach().numpy()).max() < 1e-5, name


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


WRONG = """
#include <stdio.h>
#include <string.h>
#include "model.h"

static _Alignas(64) float x[3 * 40 * 48 + 16], keep[3 * 40 + 16];
static _Alignas(64) float scores[3 * 40 * 17], kept[3 * 40 * 48];
static _Alignas(64) unsigned char workspace[MODEL_WORKSPACE_BYTES + 64];
static sparsify_tensor in[2], out[2];

static void good(void) {
  in[0] = (sparsify_tensor){x, sizeof x, {2, 17, 48}};
  in[1] = (sparsify_tensor){keep, sizeof keep, {2, 17}};
  out[0] = (sparsify_tensor){scores, sizeof scores, {0}};
  out[1] = (sparsify_tensor){kept, sizeof kept, {0}};
}

static void run(const sparsify_tensor *i, sparsify_tensor *o, void *w, size_t bytes) {
  int status = model_run(i, o, w, bytes);
  printf("%d %s\\n", status, status ? model_last_error() : "");
  good();
}

int main(void) {
  const size_t bytes = MODEL_WORKSPACE_BYTES;
  good();
  run(in, out, workspace, bytes);
  printf("%d\\n", model_init(NULL, MODEL_WEIGHTS_BYTES));
  printf("%d\\n", model_init(model_weights + 1, MODEL_WEIGHTS_BYTES));
  printf("%d\\n", model_init(model_weights, MODEL_WEIGHTS_BYTES - 1));
  printf("%d\\n", model_init(x, MODEL_WEIGHTS_BYTES));
  run(in, out, workspace, bytes);
  printf("%d\\n", model_init(model_weights, MODEL_WEIGHTS_BYTES));
  run(NULL, out, workspace, bytes);
  run(in, NULL, workspace, bytes);
  run(in, out, NULL, bytes);
  run(in, out, workspace + 4, bytes);
  run(in, out, workspace, bytes - 1);
  in[0].data = NULL; run(in, out, workspace, bytes);
  out[1].data = NULL; run(in, out, workspace, bytes);
  in[1].data = keep + 1; run(in, out, workspace, bytes);
  in[0].bytes = 2 * 17 * 48 * 4 - 1; run(in, out, workspace, bytes);
  out[0].bytes = 2 * 17 * 17 * 4 - 1; run(in, out, workspace, bytes);
  in[0].shape[2] = 47; run(in, out, workspace, bytes);
  in[0].shape[0] = 4; run(in, out, workspace, bytes);
  in[0].shape[1] = -1; run(in, out, workspace, bytes);
  in[0].shape[1] = INT64_MAX; run(in, out, workspace, bytes);
  in[1].shape[1] = 18; run(in, out, workspace, bytes);
  printf("%d %s\\n", model_run_entry(7, in, out, workspace, bytes), model_last_error());
  run(in, out, workspace, bytes);
  return 0;
}
"""


@pytest.mark.isa("x86-avx2")
def test_wrong_arguments_are_answered_with_a_code(folder: Path, host: Any) -> None:
    (folder / "wrong.c").write_text(WRONG)
    done = host.run(host.build(folder, sources=("wrong.c",), flags=SANITIZERS))
    expected = """
6 the model was not initialised
1
4
3
5
6 the model was not initialised
0
1 inputs or outputs are null
1 inputs or outputs are null
1 the workspace is null
4 the workspace is misaligned
3 the workspace is too small
1 input 'x' is null
1 output 'kept' is null
4 input 'keep' is misaligned
3 input 'x' has fewer bytes than its shape takes
3 output 'scores' has fewer bytes than its shape takes
2 input 'x' has a size out of its range
2 input 'x' has a size out of its range
2 input 'x' has a size out of its range
2 input 'x' has a size out of its range
2 input 'keep' has a size that differs from another input's
1 the entry does not exist
0 """
    assert done.stdout.strip().splitlines() == [line.strip() for line in expected.split("\n")[1:]]


FAILING = """
#include <stdio.h>
#include "launch.h"
#include "sparsify.h"

extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);

/* Takes half of the scratch memory; fails, or gives it back. */
static int work(int task, sparsify_tasks *tasks, void *fails) {
  void *block = __TVMBackendAllocWorkspace(1, 0, 8192, 2, 32);
  (void)task, (void)tasks;
  if (!block) return -2;
  return *(int *)fails ? -1 : __TVMBackendFreeWorkspace(1, 0, block);
}

int main(void) {
  int fails = 1;
  if (sparsify_set_threads(THREADS) != SPARSIFY_OK) return 1;
  for (int i = 0; i < 200; ++i)
    if (sparsify_launch(work, &fails, 0) != -1) return 2;
  fails = 0;
  printf("%d\\n", sparsify_launch(work, &fails, 0));
  return 0;
}
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_that_fail_leave_their_scratch_memory(
    threads: int, host: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "failing.c").write_text(FAILING)
    launch = ["serial.c"] if threads == 1 else ["threads.c", "pool.c"]
    sources = ["failing.c", *(str(folder / file) for file in ("sparsify.c", *launch))]
    flags = ["-std=gnu11", "-pthread", *SANITIZERS, f"-DTHREADS={threads}", f"-I{folder}"]
    command = ["cc", *flags, *sources, "-o", "failing"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert host.run(tmp_path / "failing").stdout == "0\n"


class Doubled(nn.Module):
    """Half of a length and twice that, which is the length again for even ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = x[:, ::2]
        return x + torch.stack([halves, halves], -1).flatten(-2)


ODD = """
#include "model.h"
#include <stdio.h>

static _Alignas(SPARSIFY_ALIGNMENT) float x[9], y[9];
static _Alignas(SPARSIFY_ALIGNMENT) unsigned char workspace[MODEL_WORKSPACE_BYTES];

int main(void) {
  model_init(model_weights, MODEL_WEIGHTS_BYTES);
  for (int length = 8; length <= 9; ++length) {
    sparsify_tensor in[1] = {{x, sizeof x, {1, length}}}, out[1] = {{y, sizeof y, {0}}};
    int status = model_run(in, out, workspace, sizeof workspace);
    printf("%d %s\\n", status, status ? model_last_error() : "");
  }
  return 0;
}
"""


@pytest.mark.isa("x86-avx2")
def test_sizes_that_do_not_go_through_the_model_are_refused(tmp_path: Path, host: Any) -> None:
    compiled = sparsify.compile(Doubled().eval(), (torch.randn(3, 8),))
    compiled.export_c(tmp_path / "c", target="x86-avx2", largest={"x": (1, 9)})
    (tmp_path / "c" / "odd.c").write_text(ODD)
    done = host.run(host.build(tmp_path / "c", sources=("odd.c",), flags=SANITIZERS))
    assert done.stdout.splitlines() == [
        "0 ",
        "2 the inputs have sizes that do not go through the model",
    ]


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
    options = ["-DMODEL_SHARED=ON", "-DCMAKE_BUILD_TYPE=Release", "-DMODEL_THREADS=ON"]
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
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "use.cpp", "build/libmodel.a"]
    subprocess.run([*command, "-pthread", "-o", "use"], cwd=folder, check=True)
    said = subprocess.run([folder / "use"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "2 2.0000",
        "model has no such entry",
        "input 'x' has a size out of its range",
    ]


def test_what_cannot_be_exported(compiled: Any, tmp_path: Path) -> None:
    def refused(message: str, model: Any = compiled, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model.export_c(tmp_path / "none", **{"target": "x86-avx2", **options})
        assert not (tmp_path / "none").exists()

    refused("unknown target 'z80'; targets: native, x86-avx2", target="z80")
    refused("no CPU 'cortex-a1' for aarch64", target="arm64-neon,cpu=cortex-a1")
    refused("name 'my model' must be a C identifier", name="my model")
    refused("largest names z, but entry 'forward' takes x, keep", largest={"z": (1,)})
    refused(r"largest\['keep'\] \(3,\) needs 2 sizes", largest={"keep": (3,)})
    refused("dim 0 of input 'x' is 0 at most", largest={"x": (0, 1, 48)})

    class Histogram(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.histc(x * 2, 4, 0.0, 1.0)

    refused(
        "histc .*cannot be compiled: .* has no lowering; exported C has no PyTorch",
        sparsify.compile(Histogram(), (torch.rand(8),)),
    )


@pytest.mark.isa("x86-avx2")
def test_sizes_of_the_examples_are_the_largest(
    compiled: Any, host: Any, net: nn.Module, tmp_path: Path
) -> None:
    compiled.export_c(tmp_path, target="x86-avx2", name="tiny")
    assert "s" in (header := (tmp_path / "tiny.h").read_text()) and ": 1 to 20" in header
    program = host.build(tmp_path, "tiny")
    check(host, program, net, (2, 20))
    np.save(tmp_path / "x.npy", np.zeros((2, 21, 48), "f4"))
    done = host.run(program, "x.npy", "keep.npy", check=False)
    assert done.returncode == 1 and "input 'x' has a size out of its range" in done.stderr
    huge = (
        (tmp_path / "x.npy").read_bytes().replace(b"(2, 21, 48)", b"(9223372036854775807, 21, 48)")
    )
    (tmp_path / "x.npy").write_bytes(huge)
    done = host.run(program, "x.npy", "keep.npy", check=False)
    assert done.returncode == 1 and done.stderr.endswith("x.npy: is larger than memory\n")
    done = host.run(program, "--weights", "none", "x.npy", "keep.npy", check=False)
    assert done.returncode == 1 and done.stderr.endswith("none: the file cannot be read\n")
