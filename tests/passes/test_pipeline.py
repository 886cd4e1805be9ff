"""Pipelines: checks after each pass, text form, switching off, listing."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from sparsify.contracts import GraphPass
from sparsify.passes import (
    PORTABLE,
    SPECIALISE,
    describe,
    largest_error,
    parse_pipeline,
    pass_names,
    pipeline_text,
    run_pipeline,
    without,
)
from sparsify.passes.fuse_epilogue import FuseEpilogue
from sparsify.passes.select_layout import SelectLayout
from sparsify.passes.sparse_linear import SparseLinear
from sparsify.program import ProgramSet


@dataclass(frozen=True)
class Doubles(GraphPass):
    """Wrong on purpose: doubles what relu returns."""

    name: ClassVar[str] = "doubles"
    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, rewriter, context):
        for node in rewriter.nodes:
            if node.target == torch.ops.aten.relu.default:
                with rewriter.graph.inserting_after(node):
                    twice = rewriter.call(torch.ops.aten.add.Tensor, (node, node))
                rewriter.replace(node, twice)
                twice.args = (node, node)
        return ()


@dataclass(frozen=True)
class Nans(GraphPass):
    """Wrong on purpose: takes the logarithm of what relu returns, and then its sign."""

    name: ClassVar[str] = "nans"
    tolerance: ClassVar[float] = 1e-5

    def rewrite(self, rewriter, context):
        for node in rewriter.nodes:
            if node.target == torch.ops.aten.relu.default:
                node.target = torch.ops.aten.log.default
        return ()


def relu_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU())


@pytest.mark.parametrize("wrong", [Doubles(), Nans()])
def test_numeric_verification_catches_wrong_numbers(wrong, import_model):
    programs = import_model(relu_net(), torch.randn(3, 4))
    run_pipeline(programs, [wrong])
    with pytest.raises(ValueError, match=f"pass '{wrong.name}' changed the results"):
        run_pipeline(programs, [SparseLinear(), wrong], verify="numeric")


def test_numeric_verification_needs_examples(import_model):
    programs = import_model(relu_net(), torch.randn(3, 4))
    programs.programs[0].exported._example_inputs = None
    with pytest.raises(ValueError, match="no example inputs"):
        run_pipeline(programs, [SparseLinear()], verify="numeric")


def test_a_malformed_result_names_the_pass(import_model):
    @dataclass(frozen=True)
    class Careless(GraphPass):
        name: ClassVar[str] = "careless"

        def run(self, programs, context):
            result = super().run(programs, context)
            for node in result.programs["forward"].graph.nodes:
                node.meta.pop("val", None)
            return result

        def rewrite(self, rewriter, context):
            return ()

    programs = import_model(relu_net(), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"after pass 'careless'.*no shape"):
        run_pipeline(programs, [Careless()])


def test_the_observer_sees_each_pass(import_model):
    programs = import_model(relu_net(), torch.randn(3, 4))
    seen: list[tuple[str, ProgramSet, ProgramSet]] = []
    result = run_pipeline(
        programs,
        [SparseLinear(), FuseEpilogue()],
        observer=lambda pass_, before, after: seen.append((pass_.name, before, after)),
    )
    assert [name for name, _, _ in seen] == ["sparse_linear", "fuse_epilogue"]
    assert seen[0][1] is programs and seen[0][2] is seen[1][1]
    assert seen[1][2] is result.programs
    assert {d.made_by for d in result.decisions} == {"sparse_linear", "fuse_epilogue"}


def test_largest_error_of_a_program_with_itself_is_zero(import_model):
    (program,) = import_model(relu_net(), torch.randn(3, 4))
    assert largest_error(program, program) == 0.0


TEXT = "fuse_attention,sparse_linear{max_density=0.7},select_layout{layout=sell{rows=8,k_block=64}}"


def test_text_names_passes_and_options():
    passes = parse_pipeline(f" {TEXT.replace(',fuse', ' , fuse')} ")
    assert [p.name for p in passes] == ["fuse_attention", "sparse_linear", "select_layout"]
    assert passes[1] == SparseLinear(max_density=0.7)
    assert passes[2] == SelectLayout(layout="sell{rows=8,k_block=64}")


@pytest.mark.parametrize("passes", [parse_pipeline(TEXT), PORTABLE, SPECIALISE, ()])
def test_text_round_trip(passes):
    assert parse_pipeline(pipeline_text(passes)) == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fuse_everything", "unknown pass 'fuse_everything'; known passes: .*sparse_linear"),
        ("sparse_linear{density=1}", "no option 'density'; it has max_density"),
        ("fuse_norm{a=1}", "no option 'a'; it has none"),
        ("sparse_linear{max_density=much}", "max_density='much' is not of type float"),
        ("sparse_linear{max_density}", "write max_density=VALUE"),
        ("select_layout{tokens=1.5}", "tokens='1.5' is not of type int"),
        ("sparse_linear{max_density=1", "a brace stays open"),
        ("sparse_linear}", "a brace closes that was not opened"),
        ("sparse linear", "cannot read 'sparse linear'"),
    ],
)
def test_text_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pipeline(text)


def test_passes_can_be_switched_off():
    left = without(PORTABLE, ["fuse_norm", "fuse_epilogue"])
    assert {p.name for p in PORTABLE} - {p.name for p in left} == {"fuse_norm", "fuse_epilogue"}
    with pytest.raises(ValueError, match="unknown pass 'fuse_norms'"):
        without(PORTABLE, ["fuse_norms"])


def test_the_list_describes_every_pass():
    infos = {info.name: info for info in describe()}
    assert tuple(infos) == pass_names()
    assert {p.name for p in (*PORTABLE, *SPECIALISE)} <= set(infos)
    assert infos["sparse_linear"].options == {"max_density": 0.9}
    assert infos["select_layout"].stage == "specialise"
    assert infos["analyze_weights"].stage == "on request"
    assert all(info.summary.endswith((".", "``.")) for info in infos.values())
