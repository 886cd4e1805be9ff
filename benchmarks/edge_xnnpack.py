"""Linears in XNNPACK for ARM against exported C: instructions of a pair of layers, in an emulator.

    make edge-deps
    python -m benchmarks.edge_xnnpack --sparsity 0 80 90 --shapes 384x384 1536x384

pip fetches LiteRT's wheel for ARM, which has XNNPACK in it; a small C program calls it. A shape is
that of two layers, out x in and then in x out, so that pairs make a chain: the count is that of two
pairs less that of one, so that what runs around them does not count. Without zeros XNNPACK's dense
layers are compared, else its sparse ones. Every program's result is compared with float64. Counts
are proxies and no times.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import tflite
from benchmarks.arm_peers import fetch, take, with_processor
from benchmarks.edge import emulated
from sparsify.bench.foreign import Emulated

RUNNER = Path(__file__).with_name("litert_run.c")
REQUIREMENT = "ai-edge-litert==2.3.0"
SHAPES = ("384x384", "1536x384", "3072x768")
SPARSITIES = (0, 80, 90)
TOLERANCE = 1e-4
"""Of the result's scale; sums of up to six layers in fp32."""


class LiteRt:
    """LiteRT's library for ARM, its schema, and a program that runs a file."""

    def __init__(self, machine: Emulated, folder: Path) -> None:
        self.machine, self.folder = with_processor(machine, folder), folder
        with fetch(REQUIREMENT, folder) as wheel:
            library = take(wheel, "/libLiteRt.so", folder / "libLiteRt.so")
            source = take(wheel, "/schema_py_generated.py", folder / "schema.py")
        found = importlib.util.spec_from_file_location("tflite_schema", source)
        assert found is not None and found.loader is not None
        self.schema = importlib.util.module_from_spec(found)
        found.loader.exec_module(self.schema)
        compiler = [f"{machine.prefix}-gcc", "-O2", str(RUNNER), str(library), "-o", "program"]
        flags = [f"-Wl,-rpath,{folder}", "-Wl,--allow-shlib-undefined"]
        subprocess.run([*compiler, *flags], cwd=folder, check=True)

    def count(self, linears: Sequence[tflite.Linear], tokens: int, sparse: bool) -> int:
        """Instructions of one run of a chain."""
        rng = np.random.default_rng(0)
        path = self.folder / "model.tflite"
        if sparse:
            size = (8, tokens // 8)
            features = linears[0][0].shape[1]
            stem = _normal(rng, features, 3, 3, 3), _normal(rng, features)
            given = _normal(rng, 2 * size[0], 2 * size[1], 3)
            tflite.write_sparse(self.schema, path, stem, linears, size)
            expected = _chain(_stem(given, stem), linears).mean(0)
        else:
            given = _normal(rng, tokens, linears[0][0].shape[1])
            tflite.write_dense(self.schema, path, linears, tokens)
            expected = _chain(given.astype(np.float64), linears)
        (self.folder / "given").write_bytes(given.tobytes())
        counts = self.machine.count(
            self.folder / "program", [str(path), str(given.size), str(expected.size)],
            stdin="given", stdout="found",
        )  # fmt: skip
        _check("XNNPACK", np.fromfile(self.folder / "found", np.float32), expected.ravel())
        return counts.classes["all"]


def count_ours(
    machine: Emulated, target: str, linears: Sequence[tflite.Linear], tokens: int
) -> int:
    """Instructions of one run of a chain, compiled and exported."""
    import sparsify

    layers = []
    for weight, bias in linears:
        layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        layers[-1].weight.data = torch.from_numpy(weight)
        layers[-1].bias.data = torch.from_numpy(bias)
    model = nn.Sequential(*layers).eval()
    given = _normal(np.random.default_rng(0), 1, tokens, linears[0][0].shape[1])
    with tempfile.TemporaryDirectory(prefix="sparsify-") as made:
        folder = Path(made)
        compiled = sparsify.compile(model, (torch.from_numpy(given),))
        compiled.export_c(folder, target=target)
        np.save(folder / "x.npy", given)
        counts = machine.count(machine.build(folder), ["x.npy", "-o", "out.npy"])
        found = np.load(folder / "out.npy")
    _check("sparsify", found[0], _chain(given[0].astype(np.float64), linears))
    return counts.classes["all"]


def _normal(rng: np.random.Generator, *shape: int) -> tflite.Floats:
    return rng.standard_normal(shape, np.float32)


def pairs(shape: tuple[int, int], sparsity: int, count: int) -> list[tflite.Linear]:
    """Linears of out x in and in x out, in turns; that share of each weight is zero."""
    rng = np.random.default_rng(shape[0] + sparsity)
    linears = []
    for rows, columns in [shape, shape[::-1]] * count:
        weight = _normal(rng, rows, columns) / np.float32(np.sqrt(columns))
        weight[rng.random(weight.shape) < sparsity / 100] = 0
        linears.append((weight, _normal(rng, rows)))
    return linears


def _chain(x: np.ndarray[Any, Any], linears: Sequence[tflite.Linear]) -> np.ndarray[Any, Any]:
    for weight, bias in linears:
        x = x @ weight.T.astype(np.float64) + bias
    return x


def _stem(image: tflite.Floats, stem: tflite.Linear) -> np.ndarray[Any, Any]:
    """The convolution's result in float64, a row for each pixel."""
    weight, bias = (torch.from_numpy(tensor).double() for tensor in stem)
    planes = torch.from_numpy(image).double().permute(2, 0, 1)[None]
    found = nn.functional.conv2d(planes, weight.permute(0, 3, 1, 2), bias, stride=2, padding=1)
    return found[0].flatten(1).T.numpy()


def _check(name: str, found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error < TOLERANCE:
        raise SystemExit(f"{name}: off by {error:.1e} of the result's scale")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="cortex-a72")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out x in")
    parser.add_argument("--sparsity", type=int, nargs="+", default=SPARSITIES, help="percent")
    parser.add_argument("--tokens", type=int, default=128, help="a multiple of 8")
    given = parser.parse_args(arguments)
    if given.tokens % 8 or any(0 < zeros < 67 for zeros in given.sparsity):
        parser.error("XNNPACK's sparse layers need two thirds of zeros, and rows of 8 pixels")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    machine = emulated(given.target)
    print(f"proxies, no times: millions of instructions on {given.target}, {given.tokens} tokens")
    print(f"{'pair':>10}{'zeros':>7}{'sparsify':>10}{'XNNPACK':>9}{'ratio':>7}")
    with tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        litert = LiteRt(machine, Path(folder))
        for name in given.shapes:
            rows, columns = map(int, name.split("x"))
            for zeros in given.sparsity:
                chains = [pairs((rows, columns), zeros, count) for count in (1, 2)]
                ours = [count_ours(machine, given.target, c, given.tokens) for c in chains]
                theirs = [litert.count(c, given.tokens, zeros > 0) for c in chains]
                pair = [(twice - once) / 1e6 for once, twice in (ours, theirs)]
                print(f"{name:>10}{zeros:>6}%{pair[0]:>10.1f}{pair[1]:>9.1f}", end="")
                print(f"{pair[0] / pair[1]:>7.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
