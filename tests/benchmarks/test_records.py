"""Records of a run that was cut short: kept for equal options, and for these alone."""

import argparse
from pathlib import Path

from benchmarks.records import Records, table


def records(path: Path | None, **options: object) -> Records:
    return Records.of(argparse.Namespace(output=path, part=["a"], methods=None, **options))


def test_only_what_is_missing_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    first = records(path, seeds=(1, 2), density=25)
    first.add({"part": "a", "method": "x 10%", "found": 3})
    again = records(path, seeds=[1, 2], density=25)
    assert again.written("a") == [{"part": "a", "method": "x 10%", "found": 3}]
    assert again.missing("a", ("x 10%", "x 25%", "y")) == ["x 25%", "y"]
    assert again.missing("a", ("x 10%", "x 25%", "y"), ["x"]) == ["x 25%"]
    assert again.missing("b", ("x 10%",)) == ["x 10%"]


def test_other_options_have_records_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records(path, density=25).add({"part": "a", "method": "x", "found": 3})
    other = records(path, density=10)
    assert other.written("a") == [] and other.missing("a", ("x",)) == ["x"]
    other.add({"part": "a", "method": "x", "found": 1})
    assert [cell["found"] for cell in records(path, density=25).written("a")] == [3]


def test_no_file_keeps_nothing_and_a_table_has_all_columns() -> None:
    none = records(None, density=25)
    none.add({"part": "a", "method": "x"})
    assert none.written("a") == []
    made = table([{"part": "a", "method": "x"}, {"part": "a", "method": "y", "mass": 0.5}])
    assert [column.header for column in made.columns] == ["method", "mass"]
