"""Buffers of what Relax made shrink before TVM's pipeline; kernels of our own stay as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import tvm
from torch import nn
from tvm.ir.instrument import pass_instrument
from tvm.s_tir import SBlock
from tvm_ffi import structural_equal
from tvm_ffi.structural import structural_walk

from sparsify.codegen.build import kernel_passes
from sparsify.codegen.compaction import COMPACTION, LEFT_OUT, compact_buffers, without_compaction
from sparsify.codegen.kernels.cpu.bitmap import BitmapLinear
from sparsify.codegen.kernels.cpu.column_tiles import ColumnTilesLinear
from sparsify.codegen.kernels.cpu.dense import DenseLinear
from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.sell import SellLinear
from sparsify.codegen.lower import lower
from sparsify.codegen.target import Target
from sparsify.frontend.torch import import_torch
from sparsify.layouts import Bitmap, DenseColumns, PackedDense, Sell

TARGET = Target.parse("x86-avx2")


class Positions(nn.Module):
    """Its kernel keeps the best value and position of a row while it goes through it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


def sizes(function: Any) -> set[str]:
    """Elements of each buffer that a function allocates, as products of extents."""
    found = set()

    def allocations(block: Any) -> None:
        found.update("*".join(map(str, buffer.shape)) for buffer in block.alloc_buffers)

    structural_walk(function.body, [(SBlock, allocations)])
    return found


def test_a_buffer_shrinks_to_what_one_row_uses() -> None:
    program = import_torch(Positions().eval(), (torch.randn(7, 5),))["forward"]
    passes = [each for each in kernel_passes(TARGET) if each is not compact_buffers]
    with TARGET.tvm():
        module = tvm.transform.Sequential(passes)(lower({"forward": program}, TARGET))
    (name,) = [n for n, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert "T.int64(1)" not in sizes(module[name])
    assert "T.int64(1)" in sizes(compact_buffers(module)[name])


def test_kernels_of_our_own_are_untouched() -> None:
    kernel = BitmapLinear(TARGET.isa, 9, 33, Bitmap(1, 32), Epilogue(), 4)
    module = tvm.IRModule({kernel.name: kernel.build()})
    assert structural_equal(compact_buffers(module)[kernel.name], module[kernel.name])


@pytest.mark.parametrize("context", [tvm.transform.PassContext, without_compaction])
def test_tvm_has_the_pass_and_leaves_it_out(context: Callable[[], Any]) -> None:
    seen = set()

    @pass_instrument
    class Watch:
        def run_before_pass(self, module: Any, info: Any) -> None:
            seen.add(info.name)

    kernel = BitmapLinear(TARGET.isa, 9, 33, Bitmap(1, 32), Epilogue(), 4)
    with context() as current:
        current.override_instruments([Watch()])
        tvm.compile(tvm.IRModule({kernel.name: kernel.build()}), target=TARGET.tvm())
    assert "tirx.UnrollLoop" in seen
    assert (COMPACTION in seen) == (context is tvm.transform.PassContext)
    assert seen.isdisjoint(LEFT_OUT) == (context is without_compaction)


KERNELS: list[Any] = [
    BitmapLinear(TARGET.isa, 9, 33, Bitmap(1, 32), Epilogue(True, "gelu", True), 4),
    ColumnTilesLinear(TARGET.isa, 33, 17, DenseColumns(16), Epilogue(), 4),
    DenseLinear(TARGET.isa, 17, 9, PackedDense(6), Epilogue(True), 2, 2, 4),
    SellLinear(TARGET.isa, 31, 15, Sell(8, 7, 16), Epilogue(True, "silu"), 2, 2),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_what_is_left_out_changes_no_kernel(kernel: Any) -> None:
    bind = tvm.tirx.transform.BindTarget(TARGET.tvm().with_host(TARGET.tvm()))
    module = bind(tvm.IRModule({kernel.name: kernel.build()}))
    pipeline, _, _ = tvm.tirx.get_default_tir_pipeline(TARGET.tvm())
    with tvm.transform.PassContext(disabled_pass=[COMPACTION]):
        whole = pipeline(module)
    with without_compaction():
        assert structural_equal(pipeline(module), whole)
