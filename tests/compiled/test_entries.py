"""Several entries in one compiled model: one copy of the weights, one library, one file."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import sparsify
from sparsify.artefact.container import Container
from sparsify.artefact.weights import read
from sparsify.compiled import CompiledModel
from sparsify.compiler import Builder, compile_programs
from sparsify.config import CompileConfig
from sparsify.contracts import PassContext, PassResult
from sparsify.frontend.torch import capture, normalise
from sparsify.passes.select_layout import SelectLayout
from sparsify.program import ProgramSet, WeightStore
from sparsify.rewriter import share_weights

from .conftest import Small, assemble_programs

PARAMETERS = {"many": ("ids", "scale"), "one": ("token",)}


class Many(nn.Module):
    """All tokens of a batch, with a constant that torch.export numbers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.net(ids, scale)["logits"] * torch.tensor([2.0])


class One(nn.Module):
    """One token of each row; its constant has another value and the same number."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.net(token, torch.tensor([0.5]).expand(token.shape))["logits"]


def captured(net: nn.Module) -> dict[str, ExportedProgram]:
    ids = torch.randint(0, 24, (3, 40), generator=torch.Generator().manual_seed(2))
    return {
        "many": capture(Many(net).eval(), (ids, torch.rand(3, 40))),
        "one": capture(One(net).eval(), (ids[:, 0],)),
    }


def normal(exported: dict[str, ExportedProgram]) -> ProgramSet:
    programs = {name: normalise(program)["forward"] for name, program in exported.items()}
    return share_weights(replace(program, name=name) for name, program in programs.items())


def built(net: nn.Module, config: CompileConfig) -> CompiledModel:
    exported = captured(net)
    return compile_programs(Builder.of(config), exported, lambda: normal(exported), PARAMETERS)


def inputs(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = 2 + seed % 2, 5 + seed
    return torch.randint(0, 24, shape, generator=generator), torch.rand(shape, generator=generator)


def agree(model: CompiledModel, net: nn.Module, seed: int = 3) -> None:
    ids, scale = inputs(seed)
    pairs = [
        (model.entry("many")(ids, scale=scale), Many(net)(ids, scale)),
        (model.entry("one")(ids[:, 0]), One(net)(ids[:, 0])),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Apart(SelectLayout):
    """Each program gets a layout of its own, so every linear is packed twice."""

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        many, one = programs
        first = replace(self, layout="sell{rows=8,k_block=16,window=16}")
        second = replace(self, layout="sell{rows=8,k_block=32,window=32}")
        results = [
            SelectLayout.run(first, ProgramSet((many,)), context),
            SelectLayout.run(second, ProgramSet((one,)), context),
        ]
        both = tuple(program for result in results for program in result.programs)
        return PassResult(ProgramSet(both), results[0].decisions + results[1].decisions)


@pytest.fixture(scope="module", params=["one layout", "two layouts"])
def config(request: pytest.FixtureRequest) -> CompileConfig:
    if request.param == "one layout":
        passes = "select_layout{both=0},propagate_lanes,partition"
        portable = sparsify.passes.pipeline_text(sparsify.passes.PORTABLE)
        return CompileConfig(num_threads=1, passes=f"{portable},{passes}")
    passes = (*sparsify.passes.PORTABLE, Apart(), *sparsify.passes.SPECIALISE[1:])
    return CompileConfig(num_threads=1, passes=passes)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("entries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_CACHE_DIR", str(path))
        yield path


@pytest.fixture(scope="module")
def model(small: Small, config: CompileConfig, directory: Path) -> CompiledModel:
    return built(small, config)


@pytest.fixture(scope="module")
def saved(model: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.sparsify"
    model.save(path)
    return path


def storages(weights: WeightStore) -> dict[str, int]:
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in weights.items()}


def test_entries_are_called_by_name(model: CompiledModel, small: Small) -> None:
    assert model.entries == ("many", "one")
    agree(model, small)
    assert repr(model).startswith("CompiledModel(many(ids, scale), one(token), target=")
    assert model.graph.startswith("many:\n") and "\n\none:\n" in model.graph
    names = [region.name for entry in model.entries for region in model.entry(entry).plan.regions]
    assert names == ["many_region_0", "one_region_0"]


def test_an_entry_checks_its_arguments(model: CompiledModel) -> None:
    with pytest.raises(TypeError, match="argument 'scale' is missing"):
        model.entry("many")(inputs()[0])
    with pytest.raises(
        ValueError, match=r"'token' has shape \(2, 3\) with 2 dims; the model takes 1"
    ):
        model.entry("one")(torch.zeros(2, 3, dtype=torch.long))


def test_what_means_one_entry_asks_for_it(model: CompiledModel) -> None:
    with pytest.raises(ValueError, match=r"no entry 'two', it has many, one"):
        model.entry("two")
    for use in (lambda: model(1), lambda: model.plan, lambda: model.portable):
        with pytest.raises(ValueError, match=r"entries many and one; choose by model\.entry"):
            use()


def test_weights_are_held_once(model: CompiledModel, config: CompileConfig) -> None:
    many, one = (storages(program.weights) for program in model._compilation.specialised)
    assert many.keys() & one.keys() > {"net.up.bias", "net.down.bias"}
    assert all(many[name] == one[name] for name in many.keys() & one.keys())
    tensors = model._compilation.specialised.weights
    assert model.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    packings = {name.rpartition(".")[0] for name in tensors if name.startswith("net.up.weight")}
    assert len(packings) == (1 if isinstance(config.passes, str) else 2)


def test_constants_of_one_number_stay_apart(model: CompiledModel) -> None:
    portable = model.portable_programs
    constants = [
        (program.name, name, tensor.tolist())
        for program in portable
        for name, tensor in program.weights.items()
        if tensor.numel() == 1
    ]
    assert sorted(value for _, _, (value,) in constants) == [0.5, 2.0]
    assert len({name for _, name, _ in constants}) == 2


def test_a_saved_model_is_the_same(model: CompiledModel, saved: Path, small: Small) -> None:
    loaded = sparsify.load(saved)
    assert repr(loaded) == repr(model) and loaded.graph == model.graph
    assert loaded.nbytes == model.nbytes
    ids, scale = inputs()
    assert torch.equal(loaded.entry("many")(ids, scale), model.entry("many")(ids, scale))
    assert torch.equal(loaded.entry("one")(ids[:, 0]), model.entry("one")(ids[:, 0]))
    graphs = [part for part in Container(saved).digests if part.endswith(".json")]
    assert graphs == [
        *("portable/many.json", "portable/one.json"),
        *("specialised/many.json", "specialised/one.json"),
    ]


def test_a_file_holds_each_weight_once(saved: Path, small: Small) -> None:
    weights = read(Container(saved).part("weights.safetensors"))
    values = [name for name in weights if "up.weight" in name and name.endswith("values")]
    assert values == ["net.up.weight:csr.values"]
    assert sum(t.shape == small.table.weight.shape for t in weights.values()) == 1


def test_a_loaded_model_saves_the_same_file(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.sparsify"
    sparsify.load(saved).save(again)
    assert Container(again).digests == Container(saved).digests


def test_the_second_compilation_comes_from_the_cache(
    model: CompiledModel, config: CompileConfig, small: Small
) -> None:
    exported = captured(small)

    def fail() -> ProgramSet:
        raise AssertionError("a hit needs no normal form")

    again = compile_programs(Builder.of(config), exported, fail, PARAMETERS)
    assert again.report.facts["cached"] is True
    assert again.report.decisions == model.report.decisions
    agree(again, small)


def test_every_entry_is_part_of_the_key(model: CompiledModel, small: Small) -> None:
    from sparsify.cache import key_of

    exported = captured(small)
    renamed = {"many": exported["many"], "other": exported["one"]}
    alone = {"many": exported["many"]}
    keys = {key_of(programs) for programs in (exported, renamed, alone)}
    assert len(keys) == 3 and key_of(captured(small)) in keys


@pytest.mark.parametrize("config", ["one layout"], indirect=True)
def test_it_is_built_again_for_another_user(
    saved: Path, config: CompileConfig, small: Small
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = sparsify.load(saved, trusted=False)
    assert loaded.entries == ("many", "one")
    agree(loaded, small)


def test_calls_of_entries_may_overlap(model: CompiledModel, small: Small) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(15):
                agree(model, small, seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_regions_of_entries_have_names_of_their_own(small: Small) -> None:
    """Fallbacks cut both programs; no name of a region serves twice."""

    def unsupported(node: torch.fx.Node) -> str | None:
        return "no kernel" if "embedding" in str(node.target) else None

    model = assemble_programs(normal(captured(small)), PARAMETERS, unsupported)
    regions = [r for name in model.entries for r in model.entry(name).plan.regions]
    assert len({region.name for region in regions}) == len(regions) > 2
    agree(model, small)


@pytest.mark.parametrize("names", [("a", "a"), ("a b",), ("../a",), ()])
def test_names_of_entries_are_identifiers(names: tuple[str, ...], small: Small) -> None:
    program = normalise(captured(small)["one"])["forward"]
    with pytest.raises(ValueError, match="each name an identifier of its own"):
        ProgramSet(tuple(replace(program, name=name) for name in names))
