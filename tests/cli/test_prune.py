"""sparsify prune: what is saved has the zeros, and can be loaded again."""

import json
from pathlib import Path

import pytest

from sparsify.cli.models import load_model


def zeros(weight: object) -> float:
    return float((weight == 0).float().mean())  # type: ignore[attr-defined]


def test_a_factory_is_saved_as_pt2(cli, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "pruned.pt2"
    done = cli("prune", tiny, "-o", output, "--sparsity", 0.75, "--skip", "down", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["sparsity"] == 0.75
    assert [layer["names"] for layer in record["layers"]] == [["up"]]
    saved = load_model(str(output)).model.state_dict
    assert zeros(saved["up.weight"]) == 0.75
    assert zeros(saved["down.weight"]) == 0


def test_a_pt2_is_pruned_again(cli, tiny: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.pt2", tmp_path / "second.pt2"
    assert cli("prune", tiny, "-o", first, "--sparsity", 0.5).exit_code == 0
    done = cli("prune", first, "-o", second, "--sparsity", 0.9, "--scope", "global")
    assert done.exit_code == 0, done.output
    assert "zeros in 2 weights" in done.stdout
    assert load_model(str(second)).model.example_inputs is not None


def test_a_folder_is_saved_as_a_folder(cli, folder: Path, tmp_path: Path) -> None:
    (folder / "notes.md").write_text("kept")
    output = tmp_path / "pruned"
    done = cli("prune", folder, "-o", output, "--sparsity", 0.5, "--skip", "pooler")
    assert done.exit_code == 0, done.output
    model = load_model(str(output)).module
    assert zeros(model.encoder.layer[0].output.dense.weight) == 0.5
    assert zeros(model.pooler.dense.weight) == 0
    assert (output / "notes.md").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", "80", "-o", "x.pt2"), "for 80.0% write 0.8"),
        (("--sparsity", "0.8", "-o", "x.pt2", "--skip", "nope*"), "matches no prunable layer"),
        (("--sparsity", "0.8", "-o", "x.pt2", "--scope", "block"), "scope='block'"),
        (("--sparsity", "0.8", "-o", "folder"), "is saved as a .pt2 file"),
        (("--sparsity", "0.8", "-o", "no/such/folder/x.pt2"), "no such folder to save into"),
    ],
)
def test_refusals_take_one_line(
    cli, tiny: str, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("prune", tiny, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
