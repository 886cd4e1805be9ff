"""What can come of a case, and the list of those that do not pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Verdict = Literal[
    "whole",  # passes, compiled throughout
    "fallback",  # passes, with a region left to PyTorch
    "folded",  # passes: the importer folds everything, and nothing is left to compile
    "unsupported",  # the importer refuses an operator or a type
    "import",  # the importer, or torch.export, fails
    "compile",  # a pass or TVM fails
    "run",  # the compiled model fails
    "wrong",  # other numbers, shapes or types than expected
    "crashed",  # the process died or took too long
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
FAILING = Path(__file__).parent.parent / "onnx_node_tests_failing.txt"


@dataclass(frozen=True)
class Outcome:
    """A verdict, and for one that is no plain pass the cause in one line.

    Attributes:
        fixed: inputs that were made constants, because shapes follow from their values.
    """

    verdict: Verdict
    cause: str = ""
    fixed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict in ("whole", "fallback", "folded")

    def __str__(self) -> str:
        return f"{self.verdict}: {self.cause}" if self.cause else self.verdict


def read_failing(path: Path = FAILING) -> dict[str, str]:
    """Verdict and cause of each case that is known not to pass, by name."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split(maxsplit=1) for line in lines)  # type: ignore[misc]


def write_failing(outcomes: Mapping[str, Outcome], path: Path = FAILING) -> None:
    """Writes those that do not pass, by name, with the cause of each."""
    head = f"# onnx {_onnx_version()}: python -m tests.peers.onnx_node_tests --write\n"
    lines = [f"{name} {outcome}\n" for name, outcome in sorted(outcomes.items())]
    partial = path.with_suffix(".partial")
    partial.write_text(head + "".join(lines))
    partial.replace(path)


def first_line(text: str, width: int = 160) -> str:
    """The first line that says something, cut to a readable length."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else "no message"
    return line if len(line) <= width else f"{line[: width - 1]}…"


def count_by_verdict(outcomes: Iterable[Outcome]) -> dict[Verdict, int]:
    """How many there are of each verdict."""
    counts = dict.fromkeys(VERDICTS, 0)
    for outcome in outcomes:
        counts[outcome.verdict] += 1
    return counts


def _onnx_version() -> str:
    import onnx

    return onnx.__version__
