"""The library's packing in C makes the bytes that `sparsify.layouts` makes."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sparsify.codegen.emit.ort_ops.build import SOURCES
from sparsify.layouts import Csr, Sell

_TABLE = """
#include "library.h"
const TiledKernels sell_kernels, dense_kernels;
const TileCosts few_costs, many_costs;
const RowCosts row_costs;
const int64_t few_tokens = 1, dense_rows_unit = 1;
const int64_t sell_widest_block = 1, sell_window_rows = 1;
"""


class CsrStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "nnz")),
        *((name, ctypes.c_void_p) for name in ("offsets", "column", "value")),
    ]


class SellStruct(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("rows", "k_block", "window")),
        *((n, ctypes.c_int64) for n in ("entries", "slots", "stream", "tail")),
        *((n, ctypes.c_void_p) for n in ("starts", "outputs", "columns", "values")),
    ]


Pack = Callable[[torch.Tensor, Sell], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("packing")
    (folder / "table.c").write_text(_TABLE)
    sources = [str(SOURCES / "weight.c"), str(SOURCES / "runtime.c"), str(folder / "table.c")]
    flags = ["-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-pthread"]
    path = folder / "packing.so"
    subprocess.run(["cc", *flags, f"-I{SOURCES}", "-o", str(path), *sources], check=True)
    library = ctypes.CDLL(str(path))

    def run(weight: torch.Tensor, layout: Sell) -> dict[str, torch.Tensor]:
        packed = Csr().pack(weight)
        offsets = packed["offsets"].numpy().astype(np.int64)
        columns = packed["columns"].numpy().astype(np.int32)
        values = packed["values"].numpy()
        csr = CsrStruct(
            *weight.shape, values.size, offsets.ctypes.data, columns.ctypes.data, values.ctypes.data
        )
        made = SellStruct()
        options = [ctypes.c_int64(n) for n in (layout.rows, layout.k_block, layout.window)]
        assert library.pack_sell(ctypes.byref(csr), *options, ctypes.byref(made)) == 0

        def taken(place: int, count: int, dtype: type) -> torch.Tensor:
            size = count * np.dtype(dtype).itemsize
            data = ctypes.string_at(place, size) if size else b""
            return torch.from_numpy(np.frombuffer(bytearray(data), dtype))

        result = {
            "starts": taken(made.starts, made.entries, np.int32),
            "outputs": taken(made.outputs, made.slots, np.int32),
            "columns": taken(made.columns, made.stream, np.int64),
            "values": taken(made.values, made.tail, np.float32),
        }
        library.free_sell(ctypes.byref(made))
        return result

    return run


@pytest.mark.parametrize("layout", [Sell(8, 256, 384), Sell(4, 7, 12), Sell(8, 16, 8)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (13, 9), (40, 64), (385, 300)])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_sell_has_the_same_bytes(
    pack: Pack, layout: Sell, shape: tuple[int, int], density: float
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    weight[0] = 0
    expected, found = layout.pack(weight), pack(weight, layout)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
