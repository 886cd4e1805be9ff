"""What exported C refuses when it runs, and what cannot be exported at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from tests.export.exported_net import SANITIZERS

WRONG = """
#include <stdio.h>
#include <string.h>
#include "model.h"

static _Alignas(64) float x[3 * 40 * 48 + 16], keep[3 * 40 + 16];
static _Alignas(64) float scores[3 * 40 * 17], kept[3 * 40 * 48];
static _Alignas(64) unsigned char workspace[MODEL_WORKSPACE_BYTES + 64];
static _Alignas(64) unsigned char held[MODEL_WEIGHTS_BYTES];
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
  out[1].data = x; run(in, out, workspace, bytes);
  in[1].data = scores; run(in, out, workspace, bytes);
  out[0].data = kept; run(in, out, workspace, bytes);
  out[0].data = kept + 2 * 17 * 48 - 16; run(in, out, workspace, bytes);
  out[0].data = kept + 2 * 17 * 48; run(in, out, workspace, bytes);
  out[0].data = workspace; run(in, out, workspace, bytes);
  in[0].data = workspace; run(in, out, workspace, bytes);
  in[1].data = x; run(in, out, workspace, bytes);
  memcpy(held, model_weights, sizeof held);
  printf("%d\\n", model_init(held, sizeof held));
  out[0].data = held + 64; run(in, out, workspace, bytes);
  run(in, out, held, bytes);
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
8 output 'kept' overlaps input 'x'
8 output 'scores' overlaps input 'keep'
8 output 'scores' overlaps output 'kept'
8 output 'scores' overlaps output 'kept'
0
8 output 'scores' overlaps the workspace
8 the workspace overlaps input 'x'
0
0
8 output 'scores' overlaps the weights
8 the workspace overlaps the weights
1 the entry does not exist
0 """
    said = [line.strip() for line in done.stdout.splitlines()]
    assert said == [line.strip() for line in expected.splitlines()[1:]]


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

    class Shorts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.uint16)

    refused(
        "a tensor of uint16, a type that exported C does not have",
        sparsify.compile(Shorts(), (torch.rand(8),)),
    )

    class Histogram(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.histc(x * 2, 4, 0.0, 1.0)

    refused(
        "histc .*cannot be compiled: .* has no lowering; exported C has no PyTorch",
        sparsify.compile(Histogram(), (torch.rand(8),)),
    )
