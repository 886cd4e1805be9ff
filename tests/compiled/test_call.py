"""A compiled model is called like its module, and refuses what the module would misread."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import sparsify
from sparsify.compiled import CompiledModel

from .conftest import Small, assemble, examples


def agree(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_arguments_by_position_by_name_and_mixed(assembled: CompiledModel, small: Small) -> None:
    ids, scale = examples(2, 7).values()
    expected = small(ids, scale)
    agree(assembled(ids, scale), expected)
    agree(assembled(ids, scale=scale), expected)
    agree(assembled(scale=scale, ids=ids), expected)
    agree(assembled(ids, scale, None), expected)


def test_the_structure_of_the_output_is_the_modules(assembled: CompiledModel, small: Small) -> None:
    found = assembled(**examples())
    assert type(found) is dict
    assert list(found) == ["logits", "hidden"]


def test_positions_count_by_the_modules_own_signature() -> None:
    """The second position is ``left``, though only ``right`` was in the example."""

    class Optional(nn.Module):
        def forward(
            self,
            x: torch.Tensor,
            left: torch.Tensor | None = None,
            right: torch.Tensor | None = None,
        ) -> torch.Tensor:
            x = x if left is None else x - left
            return x if right is None else x + right

    x = torch.ones(3, 4)
    model = assemble(Optional(), {"x": x, "right": x})
    agree(model(x, None, x), x + x)
    with pytest.raises(TypeError, match="argument 'left' was not among the example inputs"):
        model(x, x)


def test_nested_arguments_and_varying_positions() -> None:
    class Nested(nn.Module):
        def forward(self, *pair: torch.Tensor, extra: dict[str, torch.Tensor]) -> Any:
            return OrderedDict(sum=pair[0] + pair[1], parts=(extra["a"] * 2, [extra["b"]]))

    a, b = torch.randn(3, 4), torch.randn(3, 4)
    inputs = ((a, b), {"extra": {"a": a, "b": b}})
    model = assemble(Nested(), inputs)
    found = model(a, b, extra={"b": b, "a": a})
    assert type(found) is OrderedDict
    agree(found, Nested()(a, b, extra={"a": a, "b": b}))
    with pytest.raises(TypeError, match=r"'extra' has another structure"):
        model(a, b, extra={"a": a})


def test_results_that_are_inputs_sizes_or_constants() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3))

        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            return x * 2, x, x.shape[0] + 1, None, 3.5, self.table

    x = torch.randn(4, 2)
    model = assemble(Odd(), (torch.randn(3, 2),))
    doubled, same, size, nothing, number, table = model(x)
    agree(doubled, x * 2)
    assert torch.equal(same, x)
    assert (size, nothing, number) == (5, None, 3.5)
    table += 1
    assert model(x)[-1].tolist() == [0, 1, 2]


def test_constants_of_the_example_are_fixed() -> None:
    class Flagged(nn.Module):
        def forward(self, x: torch.Tensor, double: bool) -> torch.Tensor:
            return x * 2 if double else x + 1

    x = torch.randn(3, 4)
    model = assemble(Flagged(), (x, True))
    agree(model(x, True), x * 2)
    with pytest.raises(ValueError, match="argument 'double' is False, but it was True"):
        model(x, False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": None}, TypeError, "argument 'ids' is NoneType, the model takes a torch.Tensor"),
        ({"ids": [[1, 2]]}, TypeError, "argument 'ids' is list"),
        (
            {"ids": torch.zeros(3, 5)},
            TypeError,
            r"'ids' of shape \(3, 5\) is torch.float32, the model takes torch.int64; convert",
        ),
        (
            {"scale": torch.zeros(3, 5, device="meta")},
            ValueError,
            "'scale' of shape .* is on device meta, the model runs on the CPU",
        ),
        (
            {"scale": torch.zeros(3, 5).to_sparse()},
            ValueError,
            "is stored as torch.sparse_coo",
        ),
        (
            {"scale": torch.zeros(3)},
            ValueError,
            r"'scale' has shape \(3,\) with 1 dims; the model takes 2",
        ),
        (
            {"scale": torch.zeros(3, 6)},
            ValueError,
            r"'scale' has shape \(3, 6\): dim 1 is 6, but dim 1 of 'ids' is 5",
        ),
        ({"other": torch.zeros(1)}, TypeError, "'other' was not among the example inputs"),
    ],
)
def test_what_does_not_fit_is_named(
    assembled: CompiledModel, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        assembled(**{**examples(), **change})


def test_missing_repeated_and_surplus_arguments(assembled: CompiledModel) -> None:
    ids, scale = examples().values()
    with pytest.raises(TypeError, match="argument 'scale' is missing"):
        assembled(ids)
    with pytest.raises(TypeError, match="argument 'ids' was given twice"):
        assembled(ids, scale, ids=ids)
    with pytest.raises(TypeError, match=r"takes 3 arguments .* 4 were given"):
        assembled(ids, scale, None, None)


def test_sizes_of_the_example_without_dynamic_shapes() -> None:
    model = assemble(nn.Linear(8, 4), (torch.randn(3, 8),), dynamic_shapes=None)
    with pytest.raises(ValueError, match="dim 0 is 2, the model was compiled for 3"):
        model(torch.randn(2, 8))


def test_an_example_may_be_a_view(small: Small) -> None:
    """Its strides are symbols of the export that no call needs to know."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.net(ids, torch.ones(ids.shape))["hidden"]

    ids = torch.randint(0, 24, (3, 40))
    model = assemble(Tokens().eval(), (ids[:, 0],))
    assert [region.kind for region in model.plan.regions] == ["compiled"]
    agree(model(ids[0]), Tokens()(ids[0]))


def test_sizes_outside_the_range_are_refused() -> None:
    rows = torch.export.Dim("rows", min=4, max=6)
    model = assemble(nn.Linear(8, 4), (torch.randn(5, 8),), dynamic_shapes=({0: rows},))
    assert model(torch.randn(6, 8)).shape == (6, 4)
    for count in (0, 3, 7):
        with pytest.raises(ValueError, match=rf"dim 0 of '\w+' is {count};.* for 4 to 6"):
            model(torch.randn(count, 8))


def test_sizes_that_follow_from_others() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, twice: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], 0) + twice

    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = ({0: rows}, {0: 2 * rows})
    inputs = (torch.randn(3, 4), torch.randn(6, 4))
    model = assemble(Pair(), inputs, dynamic_shapes=shapes)
    assert model(torch.randn(5, 4), torch.randn(10, 4)).shape == (10, 4)
    with pytest.raises(ValueError, match=r"dim 0 is 9, it must be 2\*s\d+ with s\d+ = 5"):
        model(torch.randn(5, 4), torch.randn(9, 4))


def test_results_have_no_gradient(assembled: CompiledModel) -> None:
    inputs = examples()
    inputs["scale"].requires_grad_()
    assert not assembled(**inputs)["logits"].requires_grad


def test_pickling_and_copying_are_refused(assembled: CompiledModel) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"machine code.*model\.save\(path\)"):
            attempt(assembled)


def test_the_weights_are_held_once_and_packed(assembled: CompiledModel, small: Small) -> None:
    names = assembled._compilation.specialised.weights
    assert "up.weight:sell{rows=4,k_block=32,window=16}.values" in names
    assert not any(name.startswith("up.weight:csr") for name in names)
    assert len(assembled._compilation.kept) == 0
    assert all(tensor.data_ptr() % 64 == 0 for tensor in names.values())


def test_the_portable_program_has_its_weights_again(assembled: CompiledModel, small: Small) -> None:
    portable = assembled.portable
    assert "up.weight:csr.values" in portable.weights
    assert not any(("sell" in name or "panels" in name) for name in portable.weights)
    ids, scale = examples(4, 2).values()
    agree(portable.run(ids=ids, scale=scale), small(ids, scale))


def test_a_fallback_is_run_and_reported(small: Small) -> None:
    def unsupported(node: torch.fx.Node) -> str | None:
        return "no kernel for embedding" if "embedding" in str(node.target) else None

    model = assemble(small, examples(), unsupported=unsupported)
    assert {region.kind for region in model.plan.regions} == {"compiled", "torch"}
    assert "in PyTorch" in repr(model)
    ids, scale = examples(2, 9).values()
    agree(model(ids, scale), small(ids, scale))
    [fallback] = model.report.fallbacks
    assert fallback.operator == "aten.embedding.default"


# From here on with kernels.


@pytest.fixture(scope="module")
def compiled(small: Small) -> CompiledModel:
    return sparsify.compile(small, examples(), num_threads=1)


def test_kernels_compute_what_the_module_computes(compiled: CompiledModel, small: Small) -> None:
    for batch, length in ((1, 1), (2, 16), (3, 11)):
        ids, scale = examples(batch, length).values()
        agree(compiled(ids, scale), small(ids, scale))


def test_later_changes_of_the_module_do_not_matter() -> None:
    model, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    compiled = sparsify.compile(model, (x,), cache=False)
    before = compiled(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(compiled(x), before)


def test_views_and_gradients_of_inputs(compiled: CompiledModel, small: Small) -> None:
    ids, scale = examples(4, 6).values()
    expected = small(ids, scale)
    turned = scale.t().contiguous().t()
    agree(compiled(ids, turned), expected)
    shifted = torch.zeros(scale.numel() + 1)[1:].view_as(scale).copy_(scale)
    assert shifted.data_ptr() % 64
    agree(compiled(ids, shifted), expected)
    agree(compiled(ids, nn.Parameter(scale)), expected)
    mirrored = torch.complex(scale, -scale).conj().imag
    assert mirrored.is_neg()
    agree(compiled(ids, mirrored), expected)


def test_an_empty_batch_is_refused_or_right(compiled: CompiledModel) -> None:
    with pytest.raises(ValueError, match=r"dim 0 of 'ids' is 0; the model was compiled for 1"):
        compiled(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5))


def test_calls_from_several_threads_may_overlap(compiled: CompiledModel, small: Small) -> None:
    inputs = [tuple(examples(1 + i % 4, 3 + i).values()) for i in range(8)]
    expected = [small(*x) for x in inputs]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(20):
                agree(compiled(*inputs[i]), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_an_operator_outside_support_is_left_to_pytorch() -> None:
    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(torch.i0(y) + y)

    model, x = Unusual().eval(), torch.randn(5, 16)
    compiled = sparsify.compile(model, (torch.randn(3, 16),))
    assert [region.kind for region in compiled.plan.regions] == ["compiled", "torch", "compiled"]
    assert "aten.i0" in compiled.report.fallbacks[0].operator
    agree(compiled(x), model(x))
    with pytest.raises(ValueError, match=re.compile("strict=True.*aten.i0")):
        sparsify.compile(model, (torch.randn(3, 16),), strict=True)
