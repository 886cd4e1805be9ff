"""`sparsify.onnxruntime`: the library as a file, and sessions of exported models."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsify
from sparsify import onnxruntime as ours
from sparsify.codegen.emit.ort_ops.build import SOURCES
from sparsify.codegen.target import UnknownTarget

_ALLOWED = ("GLIBC_", "__gmon_start__", "_ITM_", "__cxa_finalize", "__tls_get_addr")

_EMPTY_TABLE = """
#include "library.h"
const TiledKernels sell_kernels, dense_kernels;
Kernel *const layer_norm_kernel, *const rms_norm_kernel, *const rotary_kernel;
Kernel *const gated_kernels[ACTIVATIONS], *const attention_kernels[6], *const mask_kernels[2];
Kernel *const to_lanes_kernel, *const from_lanes_kernel;
Kernel *const sell_rows_kernel, *const dense_rows_kernel;
Kernel *const columns_kernel, *const gated_rows_kernel;
Kernel *const finish_rows_kernels[ACTIVATIONS];
const TileCosts few_costs, many_costs;
const RowCosts row_costs;
const int64_t few_tokens = 1, dense_rows_unit = 1;
const int64_t sell_widest_block = 1, sell_window_rows = 1;
Operator operators[1];
const size_t operator_count = 0;
const char target_name[] = "a-newer-cpu";
const char *const required_features[] = {"xyz", NULL};
"""


class Encoder(torch.nn.Module):
    """Attention and a feed-forward network with norms, most weights zero."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(
            40, 4, 72, activation="gelu", batch_first=True, dropout=0.0
        )
        self.layer = layer.eval()
        for parameter in self.layer.parameters():
            if parameter.dim() == 2:
                parameter.data *= torch.rand(parameter.shape) < 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = Encoder()
    dynamic = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    compiled = sparsify.compile(model, (torch.randn(2, 17, 40),), dynamic_shapes=dynamic)
    path = tmp_path_factory.mktemp("exported") / "encoder.onnx"
    compiled.export_onnx(path)
    return model, path


@pytest.mark.parametrize("threads", [1, 2])
def test_an_exported_model_runs_with_any_batch_and_length(
    exported: tuple[torch.nn.Module, Path], threads: int, library: Path
) -> None:
    model, path = exported
    session = ours.session(path, threads=threads)
    name = session.get_inputs()[0].name
    for shape in ((2, 17), (1, 1), (3, 5), (1, 128), (4, 33)):
        x = torch.randn(*shape, 40)
        (y,) = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            expected = model(x)
        assert np.allclose(y, expected.numpy(), atol=2e-5), shape


def test_the_library_is_built_once(library: Path) -> None:
    before = library.stat().st_mtime_ns
    assert ours.library() == library and library.stat().st_mtime_ns == before


def test_the_library_needs_nothing_but_libc_and_exports_one_function(library: Path) -> None:
    listed = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in listed.stdout.splitlines()]
    needed = [words[-1] for words in lines if words[-2] in ("U", "w")]
    assert [name for name in needed if not any(part in name for part in _ALLOWED)] == []
    assert [words[-1] for words in lines if words[-2] == "T"] == ["RegisterCustomOps"]
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    )
    shared = [line for line in dynamic.stdout.splitlines() if "(NEEDED)" in line]
    parts = ("libc.so", "libm.so", "ld-linux")  # the last is libc's own loader
    assert all(any(part in line for part in parts) for line in shared), shared


def test_an_older_runtime_registers_nothing(library: Path) -> None:
    """Before 1.17, GetApi(17) is null."""
    asked: list[int] = []
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)

    @get_api
    def none(version: int) -> None:
        asked.append(version)

    base = (ctypes.c_void_p * 2)(ctypes.cast(none, ctypes.c_void_p).value, None)
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) is None and asked == [17]


def test_a_cpu_that_lacks_a_feature_is_refused_with_its_name(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    table = tmp_path / "table.c"
    table.write_text(_EMPTY_TABLE)
    path = tmp_path / "lacking.so"
    flags = ["-std=gnu11", "-fPIC", "-shared", "-pthread", f"-I{SOURCES}"]
    sources = [*map(str, sorted(SOURCES.glob("*.c"))), str(table)]
    subprocess.run(["cc", *flags, "-o", str(path), *sources], check=True)
    with pytest.raises(Exception, match="built for a-newer-cpu, which needs the CPU feature xyz"):
        onnxruntime.SessionOptions().register_custom_ops_library(str(path))


def test_targets_other_than_x86_are_refused() -> None:
    with pytest.raises(UnknownTarget, match="x86-64 alone"):
        ours.library("arm64-neon")


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="threads=0 must be at least 1"):
        ours.session("absent.onnx", threads=0)
