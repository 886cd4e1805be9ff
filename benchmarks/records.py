"""Records of a long run in a file: what a run that was cut short has measured is kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

Record = dict[str, Any]

_HOW = ("output", "part", "methods", "densities")
"""Options that say what is measured, or where it is written, and not what it comes to."""


@dataclass(frozen=True)
class Records:
    """The records of one benchmark that were made with the same options.

    Attributes:
        path: one a line, each with its options; None keeps none.
        options: those that a record's values depend on.
    """

    path: Path | None
    options: Record

    @classmethod
    def of(cls, given: argparse.Namespace) -> Records:
        options = {name: value for name, value in vars(given).items() if name not in _HOW}
        return cls(given.output, json.loads(json.dumps(options)))

    def written(self, part: str) -> list[Record]:
        """Those of a part that the file has."""
        if self.path is None or not self.path.exists():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        mine = [line for line in lines if line.pop("options") == self.options]
        return [line for line in mine if line["part"] == part]

    def missing(
        self, part: str, names: Iterable[str], methods: list[str] | None = None
    ) -> list[str]:
        """The names that are asked for and not in the file yet; a name begins with its method."""
        done = {record["method"] for record in self.written(part)}
        asked = (n for n in names if methods is None or n.partition(" ")[0] in methods)
        return [name for name in asked if name not in done]

    def add(self, record: Record) -> None:
        print(json.dumps(record), flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({**record, "options": self.options}) + "\n")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option that `Records.of` reads."""
    parser.add_argument(
        "--output",
        type=Path,
        help="add the records to this file, and skip those that it has, of equal options",
    )


def table(found: list[Record]) -> Table:
    """Records of one part, a row each."""
    made = Table(title=found[0]["part"], title_justify="left")
    columns = list(dict.fromkeys(name for cell in found for name in cell if name != "part"))
    for name in columns:
        made.add_column(name, justify="left" if name == "method" else "right")
    for cell in found:
        values = (cell.get(name, "") for name in columns)
        made.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    return made
