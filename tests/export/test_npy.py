"""Files of arrays that exported programs read and write."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.export.exported_net import SANITIZERS

COPY = """
#include "npy.h"

int main(int argc, char **argv) {
  const sparsify_spec spec = {"x", SPARSIFY_TYPE, 2, {0}, {0}};
  sparsify_tensor tensor;
  const char *wrong = npy_read(argv[1], &spec, &tensor);
  if (!wrong && argc > 2) wrong = npy_write(argv[2], &spec, &tensor);
  puts(wrong ? wrong : "");
  if (!wrong) free(tensor.data);
  return 0;
}
"""


@pytest.fixture(scope="module")
def copies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Programs that copy a file of a type."""
    made = tmp_path_factory.mktemp("npy")
    (made / "copy.c").write_text(COPY)
    sources = ["copy.c", str(folder / "sparsify.c"), str(folder / "serial.c")]
    for name in ("float32", "bfloat16", "int8"):
        flags = [*SANITIZERS, f"-I{folder}", f"-DSPARSIFY_TYPE=SPARSIFY_{name.upper()}"]
        subprocess.run(["cc", *flags, *sources, "-o", name], cwd=made, check=True)
    return {name: made / name for name in ("float32", "bfloat16", "int8")}


def test_files_of_every_version(copies: dict[str, Path], host: Any, tmp_path: Path) -> None:
    given, made = tmp_path / "given.npy", tmp_path / "made.npy"
    for name, program in copies.items():
        array = np.arange(35).reshape(5, 7).astype(name)
        for version in ((1, 0), (2, 0), (3, 0)):
            with open(given, "wb") as file:
                np.lib.format.write_array(file, array, version)
            assert host.run(program, given, made).stdout == "\n"
            np.testing.assert_array_equal(np.load(made).view(array.dtype), array)


def test_bfloat16_that_numpy_has_read(copies: dict[str, Path], host: Any, tmp_path: Path) -> None:
    """ml_dtypes says that its numbers are bytes; NumPy drops the order when it reads them."""
    given, made = tmp_path / "given.npy", tmp_path / "made.npy"
    array = np.arange(35).reshape(5, 7).astype(ml_dtypes.bfloat16)
    np.save(given, array)
    first = given.read_bytes()
    np.save(given, np.load(given))
    assert b"<V2" in first and b"|V2" in given.read_bytes()
    assert host.run(copies["bfloat16"], given, made).stdout == "\n"
    assert b"'<V2'" in made.read_bytes()
    np.testing.assert_array_equal(np.load(made).view(array.dtype), array)


def test_files_that_are_refused(copies: dict[str, Path], host: Any, tmp_path: Path) -> None:
    given = tmp_path / "given.npy"
    np.save(given, np.arange(35).reshape(5, 7).astype("f4"))
    good = given.read_bytes()
    other = "has another type than the input, or is stored by columns"
    for data, message in (
        (b"PK" + good, "is no .npy file of version 1 to 3"),
        (b"\x93NUMPY\x04" + good[7:], "is no .npy file of version 1 to 3"),
        (b"\x93NUMPY\x02" + good[7:11], "is no .npy file of version 1 to 3"),
        (good[:9] + b"\x10" + good[10:], "has too long a header"),
        (good[:40], "is cut short"),
        (good[:-1], "is cut short"),
        (good.replace(b"<f4", b"<i4"), other),
        (good.replace(b"<f4", b">f4"), other),
        (good.replace(b"<f4", b"|f4"), other),
        (good.replace(b"'<f4'", b"[('<f4',"), other),
        (good.replace(b"descr", b"crdes"), other),
        (good.replace(b"False", b"True "), other),
        (good.replace(b"(5, 7)", b"(35,) "), "has another number of dimensions than the input"),
    ):
        given.write_bytes(data)
        assert host.run(copies["float32"], given).stdout == message + "\n"
