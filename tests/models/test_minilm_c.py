"""The real MiniLM, nine tenths of its encoder zero, as C for a Raspberry Pi."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparsify
from sparsify.compiled import CompiledModel

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"no {COMPILER} or {EMULATOR}: make edge-deps",
    ),
]


@pytest.fixture(scope="module")
def compiled(minilm: nn.Module) -> CompiledModel:
    model = copy.deepcopy(minilm)
    model.encoder = sparsify.prune(model.encoder, sparsify.Unstructured(0.9))
    ids = torch.zeros(1, 128, dtype=torch.long)
    return sparsify.compile(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.fixture(scope="module")
def program(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    most = (2, 128)
    compiled.export_c(
        folder, target="raspberry-pi/4b", largest={"input_ids": most, "attention_mask": most}
    )
    scratch = (folder / "CMakeLists.txt").read_text().partition("SPARSIFY_SCRATCH_BYTES=")[2]
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-I."]
    sources = ["model.c", "sparsify.c", "serial.c", "main.c", "model_kernels.o"]
    defined = f"-DSPARSIFY_SCRATCH_BYTES={scratch.partition(')')[0]}"
    command = [COMPILER, *flags, defined, *sources, "-lm", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"


@pytest.mark.parametrize(("batch", "length"), [(1, 128), (2, 37), (1, 1)])
def test_it_equals_x86(compiled: CompiledModel, program: Path, batch: int, length: int) -> None:
    ids = torch.randint(0, 30522, (batch, length))
    keep = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
    expected = compiled(input_ids=ids, attention_mask=keep)
    np.save(program.with_name("ids.npy"), ids.numpy())
    np.save(program.with_name("keep.npy"), keep.numpy())
    subprocess.run(
        [EMULATOR, "-cpu", "cortex-a72", program, "ids.npy", "keep.npy", "-o", "h.npy", "p.npy"],
        cwd=program.parent,
        check=True,
    )
    for name, wanted in (("h", expected[0]), ("p", expected[1])):
        found = torch.from_numpy(np.load(program.with_name(f"{name}.npy")))
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_the_program_is_small(program: Path) -> None:
    """All but the weights: with tables, runtime, main and the C library, since it is static."""
    stripped = program.with_name("stripped")
    command = ["aarch64-linux-gnu-strip", program, "-o", stripped]
    subprocess.run(command, check=True)
    assert stripped.stat().st_size < 1_200_000
    sizes = subprocess.run(
        ["aarch64-linux-gnu-size", program.with_name("model_kernels.o")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(sizes.stdout.splitlines()[1].split()[0]) < 300_000
