"""The runtime under exported models: memory of kernels, and several models in one program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.export.exported_net import SANITIZERS, inputs

THREAD_SANITIZER = ("-g", "-fsanitize=thread")

FAILING = """
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>
#include "launch.h"

extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);

enum { BYTES = 16384 };
static int fails = 1, refused;
static atomic_int done;

/* Takes half of the scratch memory; fails, or gives it back. */
static int work(int task, sparsify_tasks *tasks, void *nothing) {
  void *block = __TVMBackendAllocWorkspace(1, 0, BYTES / 2, 2, 32);
  const struct timespec moment = {0, 100000};
  (void)tasks, (void)nothing;
  if (!block) return -2;
  if (fails && task == 0 && THREADS > 1) nanosleep(&moment, NULL); /* a worker fails first */
  return fails ? -1 : __TVMBackendFreeWorkspace(1, 0, block);
}

static int32_t kernel(void *self, sparsify_any *given, int32_t count, sparsify_any *result) {
  (void)self, (void)given, (void)count, (void)result;
  int status = sparsify_launch(work, NULL, 0);
  if (status == -2) refused = 1;
  return status;
}

static void *scratch(void) {
  static _Thread_local _Alignas(SPARSIFY_ALIGNMENT) unsigned char memory[BYTES];
  return memory;
}

static int compute(const sparsify_tensor *inputs, int64_t *computed) {
  (void)inputs, (void)computed;
  return 1;
}

static void *set_threads(void *nothing) {
  while (!atomic_load(&done)) sparsify_set_threads(THREADS);
  return nothing;
}

int main(void) {
  const sparsify_call calls[1] = {{kernel, 0, 0}};
  const sparsify_entry entry = {.name = "failing", .call_count = 1, .calls = calls,
                                .compute = compute, .scratch = scratch, .scratch_bytes = BYTES};
  sparsify_tensor none[1];
  pthread_t other;
  if (sparsify_set_threads(THREADS) != SPARSIFY_OK) return 1;
  if (pthread_create(&other, NULL, set_threads, NULL) != 0) return 1;
  for (int i = 0; i < 200; ++i)
    if (sparsify_run(&entry, "", none, none, NULL, NULL, 0) != SPARSIFY_KERNEL_FAILED) return 2;
  atomic_store(&done, 1);
  pthread_join(other, NULL);
  fails = 0;
  printf("%d %d\\n", sparsify_run(&entry, "", none, none, NULL, NULL, 0), refused);
  return 0;
}
"""


@pytest.fixture(scope="module")
def thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that make data races errors; tests are skipped where the compiler has no such."""
    folder = tmp_path_factory.mktemp("tsan")
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    build = ["cc", *THREAD_SANITIZER, "empty.c", "-o", "empty"]
    for command in (build, ["./empty"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no ThreadSanitizer: {done.stderr.strip()}")
    return THREAD_SANITIZER


def build_failing(folder: Path, tmp_path: Path, threads: int, flags: tuple[str, ...]) -> Path:
    (tmp_path / "failing.c").write_text(FAILING)
    launch = ["serial.c"] if threads == 1 else ["threads.c", "pool.c"]
    sources = ["failing.c", *(str(folder / file) for file in ("sparsify.c", *launch))]
    options = ["-std=gnu11", "-pthread", f"-DTHREADS={threads}", f"-I{folder}"]
    command = ["cc", *options, *flags, *sources, "-o", "failing"]
    subprocess.run(command, cwd=tmp_path, check=True)
    return tmp_path / "failing"


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_that_fail_leave_their_scratch_memory(
    threads: int, host: Any, folder: Path, tmp_path: Path
) -> None:
    program = build_failing(folder, tmp_path, threads, SANITIZERS)
    assert host.run(program).stdout == "0 0\n"


def test_threads_are_set_while_tasks_fail(
    host: Any, folder: Path, tmp_path: Path, thread_sanitizer: tuple[str, ...]
) -> None:
    program = build_failing(folder, tmp_path, 3, thread_sanitizer)
    assert host.run(program).stdout == "0 0\n"


AT_ONCE = """
#include <pthread.h>
#include "model.h"
#include "npy.h"

enum { THREADS = 4 };
static int failed[THREADS];

static void *use(void *given) {
  const sparsify_entry *entry = &model_entries[0];
  int *status = given;
  sparsify_tensor in[MODEL_INPUTS], out[MODEL_OUTPUTS];
  void *workspace = npy_aligned(SPARSIFY_ALIGNMENT, MODEL_WORKSPACE_BYTES);
  for (int i = 0; i < MODEL_INPUTS; ++i) {
    if (npy_reserve(&entry->inputs[i], &in[i])) return NULL;
    for (int d = 0; d < entry->inputs[i].dims; ++d) in[i].shape[d] = entry->inputs[i].most[d];
    memset(in[i].data, 0, in[i].bytes);
  }
  for (int i = 0; i < MODEL_OUTPUTS; ++i)
    if (npy_reserve(&entry->outputs[i], &out[i])) return NULL;
  for (int i = 0; i < 5; ++i) {
    *status |= model_init(model_weights, MODEL_WEIGHTS_BYTES) | sparsify_set_threads(2 + i % 2);
    *status |= model_run(in, out, workspace, MODEL_WORKSPACE_BYTES);
  }
  for (int i = 0; i < MODEL_INPUTS; ++i) free(in[i].data);
  for (int i = 0; i < MODEL_OUTPUTS; ++i) free(out[i].data);
  free(workspace);
  return NULL;
}

int main(void) {
  pthread_t threads[THREADS];
  int status = 0;
  for (int i = 0; i < THREADS; ++i)
    if (pthread_create(&threads[i], NULL, use, &failed[i]) != 0) return 1;
  for (int i = 0; i < THREADS; ++i) {
    pthread_join(threads[i], NULL);
    status |= failed[i];
  }
  return status;
}
"""


@pytest.mark.isa("x86-avx2")
def test_threads_initialise_and_run_a_model_at_once(
    host: Any, folder: Path, thread_sanitizer: tuple[str, ...]
) -> None:
    (folder / "at_once.c").write_text(AT_ONCE)
    launch, flags = ("threads.c", "pool.c"), ("-std=gnu11", "-pthread", *thread_sanitizer)
    host.run(host.build(folder, sources=("at_once.c",), launch=launch, flags=flags))


BOTH = """
#include <stdio.h>
#include "product.h"
#include "model.h"
#include "npy.h"

static _Alignas(64) unsigned char workspace[PRODUCT_WORKSPACE_BYTES + MODEL_WORKSPACE_BYTES + 64];

static int said(const char *what) {
  printf("%s: %s\\n", what, sparsify_last_error());
  return 1;
}

int main(void) {
  sparsify_tensor in[MODEL_INPUTS], out[MODEL_OUTPUTS], made[PRODUCT_OUTPUTS];
  const sparsify_spec *given = model_entries[0].inputs, *wanted = model_entries[0].outputs;
  if (product_init(product_weights, PRODUCT_WEIGHTS_BYTES)) return said("product_init");
  if (model_init(model_weights, MODEL_WEIGHTS_BYTES)) return said("model_init");
  if (sparsify_set_threads(2)) return said("sparsify_set_threads");
  if (npy_read("x.npy", &given[0], &in[0]) || npy_read("keep.npy", &given[1], &in[1])) return 2;
  if (npy_reserve(&wanted[0], &out[0]) || npy_reserve(&wanted[1], &out[1])) return 2;
  if (npy_reserve(&product_entries[0].outputs[0], &made[0])) return 2;
  for (int i = 0; i < 20; ++i) {
    if (product_run(in, made, workspace, sizeof workspace)) return said("product_run");
    if (model_run(in, out, workspace, sizeof workspace)) return said("model_run");
  }
  if (npy_write("scores.npy", &wanted[0], &out[0])) return 2;
  if (npy_write("y.npy", &product_entries[0].outputs[0], &made[0])) return 2;
  free(in[0].data), free(in[1].data), free(out[0].data), free(out[1].data), free(made[0].data);
  return 0;
}
"""

PROJECT = """
cmake_minimum_required(VERSION 3.16)
project(both C ASM)
add_compile_options({flags})
add_link_options({flags})
add_subdirectory(product)
add_subdirectory({model} model)
add_executable(both both.c)
target_link_libraries(both PRIVATE product model)
"""


@pytest.mark.isa("x86-avx2")
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_two_models_in_one_program(
    net: nn.Module, folder: Path, product: tuple[nn.Module, Path], host: Any, tmp_path: Path
) -> None:
    """The first one's kernels take less memory than the second one's."""
    module, exported = product
    shutil.copytree(exported, tmp_path / "product")
    (tmp_path / "both.c").write_text(BOTH)
    text = PROJECT.format(flags=" ".join(SANITIZERS), model=folder)
    (tmp_path / "CMakeLists.txt").write_text(text)
    build = tmp_path / "build"
    configure = ["cmake", "-S", tmp_path, "-B", build, "-DSPARSIFY_THREADS=ON"]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    x, keep = inputs(2, 19)
    np.save(build / "x.npy", x.numpy())
    np.save(build / "keep.npy", keep.numpy())
    done = host.run(build / "both", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, wanted in (("scores", net(x, keep)["scores"]), ("y", module(x))):
        found = np.load(build / f"{name}.npy")
        assert np.abs(found - wanted.detach().numpy()).max() < 1e-5, name

    header = tmp_path / "product" / "sparsify.h"
    header.write_text(header.read_text() + "/* changed since */\n")
    done = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert done.returncode and "exported by another version of sparsify" in done.stderr
