"""Every example runs as it stands and says what it should."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "compile_and_save.py": ["saved ", "loaded model agrees: True", "(3, 256)"],
    "inspect_report.py": ["sell{rows", "packed_dense{rows", "Every decision about 'up':"],
}
SLOW = {
    "demo.py": [
        *("80% zeros", "90% zeros", "in a fresh process with the same results", "onnxruntime"),
    ],
    "generate_text.py": ["sparse networks are fast:", "the same tokens as transformers: True"],
}


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *SLOW}


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    run(name, SAYS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_long_example_runs(name: str, tmp_path: Path) -> None:
    run(name, SLOW[name], tmp_path)


def run(name: str, expected: list[str], folder: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout
    assert not list(folder.iterdir()), "an example leaves nothing behind"
