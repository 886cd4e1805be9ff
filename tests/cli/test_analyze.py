"""sparsify analyze: structure, bytes, break-even and verdict of each site."""

import json
from dataclasses import dataclass

import pytest

from sparsify.cli.analyze import break_even
from sparsify.layouts import Csr, Layout, PackedDense


def test_each_site_is_described(cli, tiny: str) -> None:
    done = cli("analyze", tiny, "--json")
    assert done.exit_code == 0, done.output
    sites = {site["site"]: site for site in json.loads(done.stdout)["sites"]}
    assert set(sites) == {"up", "down"}
    up = sites["up"]
    assert up["shape"] == [64, 32]
    assert up["tokens"] == 16
    assert up["nnz"] == 64 * 16
    assert up["sparsity"] == 0.5
    assert up["dead_columns"] == 16
    assert up["dead_rows"] == 0
    assert up["occupancy"]["1x4"] == 1.0
    assert up["occupancy"]["16x1"] == 0.5
    assert up["conformity"] == {"1:4": 0.0, "2:4": 1.0, "4:8": 1.0}
    assert up["bytes"]["dense"] == 64 * 32 * 4
    assert up["bytes"]["csr"] == 64 * 16 * 6 + 65 * 4
    assert any(spec.startswith("sell{") for spec in up["bytes"])
    assert 0 < up["break_even_sparsity"] < 1
    assert sites["down"]["verdict"] == "dense"


def test_the_table_names_sites_and_blocks(cli, tiny: str) -> None:
    done = cli("analyze", tiny)
    assert done.exit_code == 0, done.output
    for word in ("up", "down", "16x16", "2:4", "break-even", "64x32"):
        assert word in done.stdout


@pytest.mark.parametrize("sparsity", ["-0.1", "1.0", "90"])
def test_a_sparsity_outside_its_range_is_refused(cli, tiny: str, sparsity: str) -> None:
    done = cli("analyze", tiny, "--impose", sparsity)
    assert done.exit_code == 2
    assert "must be at least 0 and below 1" in done.stderr


def test_a_model_without_linears_is_refused(cli, tmp_path, monkeypatch) -> None:
    (tmp_path / "relu.py").write_text(
        "import torch\ndef make():\n    return torch.nn.ReLU(), (torch.ones(2, 3),)\n"
    )
    done = cli("analyze", f"{tmp_path}/relu.py:make")
    assert done.exit_code == 2
    assert "has no linear layer to analyse" in done.stderr


@dataclass(frozen=True)
class FixedCost:
    """Dense takes 1 second, a nonzero of the sparse layout ``per_nonzero``."""

    per_nonzero: float

    def linear_seconds(
        self, layout: Layout, shape: tuple[int, int], nnz: int, tokens: int
    ) -> float:
        return 1.0 if isinstance(layout, PackedDense) else nnz * self.per_nonzero

    def candidates(self, shape: tuple[int, int], nnz: int, tokens: int) -> tuple[Layout, ...]:
        return PackedDense(), Csr()


def test_break_even_is_where_the_predicted_times_cross() -> None:
    assert break_even(FixedCost(1 / 4000), (100, 100), 8) == 0.61
    assert break_even(FixedCost(1e-9), (100, 100), 8) == 0.0
