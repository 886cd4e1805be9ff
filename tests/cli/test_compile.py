"""sparsify compile and sparsify explain."""

import json
from pathlib import Path

import pytest

import sparsify
from sparsify.cli.models import load_model

FACTORIES = Path(__file__).with_name("tiny.py")


def test_a_model_is_compiled_saved_and_loaded(cli, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "tiny.sparsify"
    done = cli("compile", tiny, "-o", output, "--threads", 1, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    sites = {d["site"] for d in json.loads(done.stdout)["decisions"]}
    assert {"up", "down"} <= sites
    loaded = load_model(tiny)
    expected = loaded.module(*loaded.inputs).detach()
    found = sparsify.load(output)(*loaded.inputs)
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_the_report_is_printed(cli, tiny: str) -> None:
    done = cli("compile", tiny)
    assert done.exit_code == 0, done.output
    assert "sparsify report" in done.stdout
    assert "64x32" in done.stdout


def test_layouts_are_measured(cli, tiny: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path))
    done = cli("compile", tiny, "--tune", "quick", "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""  # the bar is for terminals
    linears = [d for d in json.loads(done.stdout)["decisions"] if d["made_by"] == "select_layout"]
    assert linears and all(d["measured_seconds"] > 0 for d in linears)


def test_graphs_are_printed_to_stderr(cli, tiny: str) -> None:
    done = cli(
        "compile",
        tiny,
        "--print-before",
        "sparse_linear",
        "--print-after",
        "sparse_linear",
        "--json",
    )
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    before, _, after = done.stderr.partition("--- forward after sparse_linear")
    assert before.startswith("--- forward before sparse_linear")
    assert "torch.ops.aten.linear" in before
    assert "torch.ops.aten.linear" not in after
    assert "sparsify.sparse_linear" in after


def test_a_pass_can_be_switched_off(cli, tiny: str) -> None:
    done = cli("compile", tiny, "--disable", "fuse_norm", "--print-after", "all", "--json")
    assert done.exit_code == 0, done.output
    assert "after fuse_epilogue" in done.stderr
    assert "fuse_norm" not in done.stderr
    assert "fused_norm" not in done.stderr


def test_a_pipeline_can_be_written_out(cli, tiny: str) -> None:
    pipeline = "sparse_linear,select_layout{layout=packed_dense{rows=6}},propagate_lanes,partition"
    done = cli("compile", tiny, "--passes", pipeline, "--json")
    assert done.exit_code == 0, done.output
    decisions = json.loads(done.stdout)["decisions"]
    layouts = {d["layout"] for d in decisions if d["made_by"] == "select_layout"}
    assert layouts == {"packed_dense{rows=6}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "pdp-11"), "unknown target 'pdp-11'"),
        (("--passes", "nonsense"), "unknown pass 'nonsense'"),
        (("--disable", "nonsense"), "unknown pass 'nonsense'"),
        (("--print-after", "nonsense"), "unknown pass 'nonsense'"),
        (("--verify", "all"), "verify='all'"),
        (("--tune", "some"), "tune='some'"),
        (("-o", "no/such/folder/x.sparsify"), "no such folder to save into"),
        (("-o", "."), "is a folder"),
    ],
)
def test_refusals_take_one_line(cli, tiny: str, arguments: tuple[str, ...], message: str) -> None:
    done = cli("compile", tiny, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_strict_refuses_what_would_be_left_to_pytorch(cli) -> None:
    model = f"{FACTORIES}:unsupported"
    done = cli("compile", model, "--json")
    assert done.exit_code == 0, done.output
    verdicts = {d["verdict"] for d in json.loads(done.stdout)["decisions"]}
    assert "unsupported" in verdicts
    strict = cli("compile", model, "--strict")
    assert strict.exit_code == 2
    assert "bessel_j0" in strict.stderr


def test_explain_tells_every_decision_about_a_site(cli, tiny: str, tmp_path: Path) -> None:
    done = cli("explain", tiny, "up", "--json")
    assert done.exit_code == 0, done.output
    decisions = json.loads(done.stdout)["decisions"]
    assert {d["site"] for d in decisions} == {"up"}
    assert "select_layout" in {d["made_by"] for d in decisions}
    output = tmp_path / "tiny.sparsify"
    assert cli("compile", tiny, "-o", output).exit_code == 0
    again = cli("explain", output, "up", "--json")
    assert json.loads(again.stdout)["decisions"] == decisions
    assert "select_layout" in cli("explain", output, "u*").stdout


def test_explain_suggests_similar_names(cli, tiny: str) -> None:
    done = cli("explain", tiny, "ups")
    assert done.exit_code == 2
    assert "no decision was made about a site 'ups'; similar: up" in done.stderr


def test_explain_finds_a_projection_in_the_merged_site(cli, folder: Path) -> None:
    done = cli("explain", folder, "encoder.layer.0.attention.self.key", "--json")
    assert done.exit_code == 0, done.output
    sites = {d["site"] for d in json.loads(done.stdout)["decisions"]}
    assert "encoder.layer.0.attention.self.{query,key,value}" in sites
