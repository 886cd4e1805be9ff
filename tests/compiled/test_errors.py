"""Whatever cannot be compiled, saved or loaded says what, why, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify.compiled import CompiledModel

from .conftest import Small, examples

X = torch.randn(3, 8)


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(8, 4, **options).eval()


def broken(value: float) -> nn.Module:
    model = linear()
    model.weight.data[1, 2] = value
    return model


class Returns(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (broken(float("nan")), {}, ValueError, r"weight 'weight' of shape \(4, 8\) holds 1 NaN"),
        (broken(float("inf")), {}, ValueError, "NaN or infinite"),
        (linear(dtype=torch.float64), {}, ValueError, r"float64.*call model\.float\(\) first"),
        (linear(device="meta"), {}, ValueError, r"device meta.*call model\.cpu\(\) first"),
        (Returns(), {}, ValueError, "the graph is empty"),
        (nn.Linear, {}, TypeError, "pass an instance, not the class"),
        (linear(), {"target": "pdp-11"}, ValueError, "unknown target 'pdp-11'; targets: native"),
        (linear(), {"num_threads": 0}, ValueError, "num_threads=0 must be at least 1"),
        (linear(), {"num_threads": "two"}, TypeError, "num_threads='two' must be a whole number"),
        (linear(), {"passes": "fuse_tea"}, ValueError, "unknown pass 'fuse_tea'; known passes"),
        (linear(), {"disable": "fuse_tea"}, ValueError, "unknown pass 'fuse_tea'"),
        (linear(), {"recipe": 0.8}, TypeError, "recipe=0.8 is no recipe"),
        (linear(), {"dynamic_shapes": "some"}, ValueError, "dynamic_shapes='some' is unknown"),
        (linear(), {"verify": "hope"}, ValueError, "verify='hope' must be"),
    ],
)
def test_compile_says_what_is_wrong(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparsify.compile(model, (X,), **options)


def test_examples_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="example_inputs is needed"):
        sparsify.compile(linear())
    with pytest.raises(ValueError, match=r"fails on its example inputs \(\(3, 7\)"):
        sparsify.compile(linear(), (torch.randn(3, 7),))


def test_a_target_that_this_machine_cannot_run() -> None:
    with pytest.raises(RuntimeError, match=r"is code for \w+, which this machine.*target='native'"):
        sparsify.compile(linear(), (X,), target=_foreign_target())


def _foreign_target() -> str:
    from sparsify.codegen.target import Target, target_names

    return next(name for name in target_names() if Target.parse(name).missing_features())


def test_a_number_that_varies() -> None:
    class Repeated(nn.Module):
        def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
            return x.expand(count, -1) + 1

    shapes = {"x": None, "count": torch.export.Dim.DYNAMIC}
    with pytest.raises(ValueError, match="argument 'count' is a number that may vary"):
        sparsify.compile(Repeated(), (torch.randn(1, 8), 5), dynamic_shapes=shapes)


def test_strict_refuses_a_pruned_layer_that_stays_dense() -> None:
    recipe = sparsify.Unstructured(0.02)
    with pytest.raises(
        ValueError, match=r"strict=True: .* was pruned by the recipe but runs dense"
    ):
        sparsify.compile(
            nn.Sequential(nn.Linear(64, 64)), (torch.randn(64, 64),), recipe=recipe, strict=True
        )


def test_a_recipe_does_not_change_the_callers_model() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    before = model[0].weight.detach().clone()
    compiled = sparsify.compile(model, (X.repeat(1, 4),), recipe=sparsify.Unstructured(0.5))
    assert torch.equal(model[0].weight, before)
    assert compiled.report.facts["recipe"]["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("absent/model.sparsify", FileNotFoundError, "there is no directory .*absent; create it"),
        ("", IsADirectoryError, "it is a directory; name a file in it"),
        ("file/model.sparsify", OSError, "there is no directory"),
    ],
)
def test_a_place_that_cannot_be_written(
    assembled: CompiledModel, tmp_path: Path, place: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(error, match=f"cannot save to .*{message}"):
        assembled.save(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission(assembled: CompiledModel) -> None:
    """/proc refuses new files to every user, root included."""
    with pytest.raises(OSError, match=r"cannot save to /proc/m.*not writable.*another place"):
        assembled.save("/proc/model.sparsify")


def test_a_save_that_fails_leaves_the_old_file(
    assembled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.sparsify"
    path.write_text("old")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr("sparsify.artefact.files.written", full)
    with pytest.raises(OSError, match=r"cannot save to .*No space left on device"):
        assembled.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_public_names() -> None:
    with pytest.raises(AttributeError, match="'sparsify' has no attribute 'compute'"):
        sparsify.compute  # noqa: B018
    assert {"compile", "load", "prune"} <= set(dir(sparsify))


def test_an_index_outside_a_table_reads_nothing_else(small: Small) -> None:
    """Eager PyTorch raises for an index outside an embedding; kernels must not read past it."""
    compiled = sparsify.compile(small, examples())
    ids, scale = examples().values()
    ids[0, 0] = 10**6
    try:
        result = compiled(ids, scale)
    except (IndexError, ValueError, RuntimeError):
        return
    assert bool(result["logits"].isfinite().all())
