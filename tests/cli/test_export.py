"""sparsify export: what it writes, what it refuses."""

from pathlib import Path

import pytest


def test_c_for_a_board(cli, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "board"
    done = cli("export", tiny, "--c", "--target", "raspberry-pi/4b", "--name", "tiny", "-o", output,
               "--batch", 1, "--seq", 24)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {"tiny.h", "tiny.c", "tiny_kernels.o", "tiny.weights", "CMakeLists.txt", "main.c"} <= {
        path.name for path in output.iterdir()
    }
    header = (output / "tiny.h").read_text()
    assert "for raspberry-pi/4b" in header and ": 1 to 24" in header


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "x"), "say what to write: --onnx or --c"),
        (("--c", "-o", "x", "--largest", "x=8"), "largest['x'] (8,) needs 3 sizes"),
        (("--c", "-o", "x", "--largest", "x:8"), "write it as INPUT=SHAPE, such as x=1x128"),
        (("--c", "-o", "x", "--standard"), "--standard applies to --onnx only"),
        (("--onnx", "-o", "x", "--target", "native"), "--target applies to --c only"),
        (("--c", "-o", "x", "--target", "z80"), "unknown target 'z80'; targets: native"),
    ],
)
def test_refusals(cli, tiny: str, arguments: tuple[str, ...], message: str) -> None:
    done = cli("export", tiny, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_file_is_no_folder(cli, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("export", tiny, "--c", "-o", tmp_path / "file")
    assert done.exit_code == 2
    assert "is a file; name a folder" in done.stderr
