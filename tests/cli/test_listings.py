"""sparsify targets, sparsify passes, and what all commands share."""

import json

import pytest


def test_targets_name_native_and_what_is_missing_here(cli) -> None:
    done = cli("targets", "--json")
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads(done.stdout)["targets"]}
    assert rows["native"]["missing"] == []
    foreign = [name for name in ("x86-avx2", "arm64-neon") if rows[name]["missing"]]
    assert foreign
    assert "no: lacks" in cli("targets").stdout


def test_passes_are_listed_in_order_with_their_options(cli) -> None:
    from sparsify.passes import PORTABLE, SPECIALISE

    done = cli("passes", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["passes"]
    names = [row["name"] for row in rows if row["stage"] != "on request"]
    assert names == [pass_.name for pass_ in (*PORTABLE, *SPECIALISE)]
    assert all(row["summary"] for row in rows)
    assert "select_layout" in cli("passes").stdout


def test_no_colour_when_not_on_a_terminal(cli) -> None:
    assert "\x1b[" not in cli("targets").output


@pytest.mark.parametrize("command", ["compile", "analyze", "benchmark"])
def test_a_missing_model_is_one_line_and_exit_code_2(cli, command: str) -> None:
    done = cli(command, "no/such/model.pt2")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr == "error: no/such/model.pt2: no such file\n"


def test_debug_lets_the_traceback_through(cli) -> None:
    done = cli("--debug", "compile", "no/such/model.pt2")
    assert isinstance(done.exception, FileNotFoundError)
