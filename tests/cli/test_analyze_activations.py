"""sparsify analyze --activations: data from files, table and JSON."""

import json

import numpy as np
import pytest


@pytest.fixture
def arrays(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((2, 8, 32), np.float32))
    return path


def test_a_record_and_a_table(cli, tiny: str, arrays, tmp_path) -> None:
    done = cli("analyze", tiny, "--activations", "--data", arrays, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    sites = {site["site"]: site for site in record["sites"]}
    assert set(sites) == {"up", "down"} and sites["down"]["shape"] == [32, 64]
    assert sites["up"]["tokens"] == 16 and 0 <= sites["down"]["negligible"]["0.1"] < 1
    np.savez(tmp_path / "x.npz", x=np.load(arrays))
    done = cli("analyze", tiny, "--activations", "--data", tmp_path / "x.npz")
    assert done.exit_code == 0, done.output
    for word in ("down", "inputs", "spread", "zeros", "of 16"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "needs --data"),
        (["--data", "nowhere.npy"], "no such file"),
        (["--data", __file__], "must be a .txt, .npy or .npz"),
    ],
)
def test_wrong_data_is_refused(cli, tiny: str, data: list[str], words: str) -> None:
    done = cli("analyze", tiny, "--activations", *data)
    assert done.exit_code == 2 and words in done.stderr


def test_text_needs_a_tokenizer(cli, tiny: str, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("zeros")
    done = cli("analyze", tiny, "--activations", "--data", tmp_path / "text.txt")
    assert done.exit_code == 2 and "tokenizer" in done.stderr
