"""Each rule of canonicalisation: the graph after it, and the same numbers as before."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes.canonicalize import Canonicalize

aten = torch.ops.aten


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def canonical(function, *inputs, dynamic="auto"):
    """Canonicalises and compares, with the inputs as given and with two elements of each."""
    model = function if isinstance(function, nn.Module) else Call(function)
    programs = import_torch(model, inputs, dynamic_shapes=dynamic)
    before = str(programs["forward"].graph)
    result = Canonicalize().run(programs, PassContext())
    assert str(programs["forward"].graph) == before
    program = result.programs["forward"]
    got, expected = program.run(*inputs), programs["forward"].run(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    again = Canonicalize().run(result.programs, PassContext())
    assert not again.decisions, "a canonical program is left as it is"
    return program


def calls(program):
    return [n for n in program.graph.nodes if n.op == "call_function"]


def targets(program):
    return [n.target for n in calls(program)]


X = torch.randn(3, 5, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone() * 2,
        lambda x: x.contiguous() * 2,
        lambda x: x.detach() * 2,
        lambda x: (x + 0) * 2,
        lambda x: (x - 0) * 2,
        lambda x: x * 1 * 2,
        lambda x: x / 1 * 2,
        lambda x: x**1 * 2,
        lambda x: x[:] * 2,
        lambda x: x[:, 0:] * 2,
        lambda x: x.view(x.shape) * 2,
        lambda x: x.expand(x.shape) * 2,
        lambda x: x.expand(-1, -1, -1) * 2,
        lambda x: x.permute(0, 1, 2) * 2,
        lambda x: x.repeat(1, 1, 1) * 2,
        lambda x: F.pad(x, (0, 0)) * 2,
        lambda x: torch.cat([x], 1) * 2,
        lambda x: x.to(torch.float32) * 2,
        lambda x: F.dropout(x, 0.5, False) * 2,
        lambda x: x.squeeze(1) * 2,
    ],
)
def test_nothing_is_left_of_what_does_nothing(function):
    assert targets(canonical(function, X)) == [aten.mul.Tensor]


def test_what_does_something_stays():
    assert aten.slice.Tensor in targets(canonical(lambda x: x[:, 1:], X))
    assert aten.expand.default in targets(canonical(lambda x: x.expand(2, -1, -1, -1), X))
    assert aten._to_copy.default in targets(canonical(lambda x: x.long() + 0, X))
    assert aten.permute.default in targets(canonical(lambda x: x.permute(0, 2, 1) * 2, X))
    assert aten.add.Tensor in targets(canonical(lambda x: x[:1] + torch.zeros(3, 1, 1) + 0, X))


def test_returned_copy_of_an_input_stays_a_copy():
    program = canonical(lambda x: (x.clone(), x * 2), X)
    got = program.run(X)[0]
    assert got.data_ptr() != X.data_ptr()


def test_negative_select():
    (node,) = calls(canonical(lambda x: x[:, -1], X, dynamic=None))
    assert node.target == aten.select.int and node.args[1:] == (1, 4)
    program = canonical(lambda x: x.select(-2, -2), X)
    assert aten.select.int not in targets(program)
    x = torch.randn(2, 7, 3)
    assert torch.equal(program.run(x), x[:, -2])


@pytest.mark.parametrize(
    "function,args",
    [
        (lambda x: x[:, -2:], (1, 3, 5, 1)),
        (lambda x: x[:, :-1], (1, 0, 4, 1)),
        (lambda x: x[:, -9:3], (1, 0, 3, 1)),
        (lambda x: x[..., 1:9], (2, 1, 4, 1)),
    ],
)
def test_static_slices(function, args):
    (node,) = calls(canonical(function, X, dynamic=None))
    assert node.args[1:] == args


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, -1:], lambda x: x[:, :-1], lambda x: x[:, -100:], lambda x: x[:, -3:-1]],
)
def test_dynamic_slices(function):
    program = canonical(function, X)
    (node,) = [n for n in calls(program) if n.target == aten.slice.Tensor]
    assert not any(isinstance(a, int) and a < 0 for a in node.args[1:])
    for length in (9, 4):
        x = torch.randn(2, length, 4)
        assert torch.equal(program.run(x), function(x))


def test_index_of_later_dims_is_moved_to_the_front():
    i, j = torch.tensor([0, 3, 1]), torch.tensor([3, 2, 0])
    for function in (
        lambda x, i, j: x[:, i.int()],
        lambda x, i, j: x[..., j],
        lambda x, i, j: x[:, i, j],
        lambda x, i, j: x[i % 3, :, j],
        lambda x, i, j: x[:, i[:, None]],
    ):
        program = canonical(function, X, i, j)
        (node,) = [n for n in calls(program) if n.target == aten.index.Tensor]
        assert None not in node.args[1]


def test_negative_indices_count_from_the_front():
    program = canonical(lambda x, i: x[i], X, torch.tensor([0, -1, -3, 2]))
    assert aten.where.self in targets(program)
    program = canonical(lambda x, i: x[torch.arange(3), i.argmax(-1)], X, torch.randn(3, 5))
    assert aten.where.self not in targets(program)


def test_cat():
    program = canonical(lambda x: torch.cat([torch.empty(0), x, x], -1), X)
    (node,) = [n for n in calls(program) if n.target == aten.cat.default]
    assert len(node.args[0]) == 2 and node.args[1] == 2
    program = canonical(lambda x: torch.cat([torch.empty(0), x], 1) * 2, X)
    assert targets(program) == [aten.mul.Tensor]
    program = canonical(lambda x, y: torch.cat([x, y], 1), X, torch.ones(3, 2, 4).long())
    (node,) = [n for n in calls(program) if n.target == aten.cat.default]
    assert {n.meta["val"].dtype for n in node.args[0]} == {torch.float32}


def test_squeeze_takes_only_dims_that_are_always_one():
    program = canonical(lambda x: x.unsqueeze(1).relu().squeeze(), X)
    assert targets(program)[-1] == aten.squeeze.dims
    assert program.run(torch.randn(1, 5, 4)).shape == (1, 5, 4)


def test_parts_of_a_concatenation_and_undone_dims_are_the_parts():
    def pair(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x.abs()], -1)

    program = canonical(lambda x: pair(x)[..., 1:2].squeeze(-1), X)
    assert targets(program) == [aten.abs.default]
    program = canonical(lambda x: pair(x)[..., :2].neg(), X)
    assert aten.cat.default in targets(program)
    program = canonical(lambda x: x.unsqueeze(-1).squeeze(3).neg(), X)
    assert targets(program) == [aten.neg.default]
    program = canonical(lambda x: x[:1].unsqueeze(1).squeeze(0).neg(), X)
    assert aten.unsqueeze.default in targets(program)


def int_input():
    return torch.arange(-6, 6).view(3, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 0.5,
        lambda x: x + 0.5,
        lambda x: 1 - x * 0.5,
        lambda x: x / 2,
        lambda x: x / (x.abs() + 1),
        lambda x: x + torch.ones(4),
        lambda x: (x > 0) * torch.ones(4),
        lambda x: x.exp(),
        lambda x: torch.where(x > 0, x, 0.5),
        lambda x: x > 0.5,
        lambda x: x // 4,
        lambda x: x % -4,
        lambda x: torch.softmax(x, -1, dtype=torch.float32),
        lambda x: x.clamp(min=1.5),
        lambda x: torch.maximum(x, torch.ones(4)),
    ],
)
def test_promotions_are_written_out(function):
    program = canonical(function, int_input())
    for node in calls(program):
        result = node.meta["val"]
        tensors = [a for a in node.args if hasattr(a, "meta")]
        tensors = [a.meta["val"] for a in tensors if isinstance(a.meta["val"], torch.Tensor)]
        if node.target in (aten._to_copy.default, aten.where.self) or not tensors:
            continue
        if result.dtype == torch.bool:
            assert len({t.dtype for t in tensors}) == 1
        else:
            assert {t.dtype for t in tensors} == {result.dtype}, node.format_node()


@pytest.mark.parametrize(
    "function",
    [
        lambda b: b.cumsum(-1),
        lambda b: b.sum(-1),
        lambda b: b.sum(),
        lambda b: b.int().cumsum(-1),
        lambda b: b.long().sum(-1, dtype=torch.float32),
        lambda b: b.cumprod(-1),
    ],
)
def test_sums_of_bools_are_cast_first(function):
    program = canonical(function, torch.rand(3, 4) > 0.5)
    reduction = calls(program)[-1]
    assert reduction.args[0].meta["val"].dtype == reduction.meta["val"].dtype
    assert "dtype" not in reduction.kwargs


def test_truth_of_numbers():
    for function in (lambda x: x.any(-1), lambda x: x.all(0), lambda x: x.any()):
        program = canonical(function, int_input())
        for node in calls(program):
            if node.target in (aten.any.dim, aten.any.default, aten.all.dim):
                assert node.args[0].meta["val"].dtype == torch.bool


def test_bool_arithmetic_is_logic():
    program = canonical(lambda x: (x > 0) * (x > 1), X)
    assert aten.logical_and.default in targets(program)
    program = canonical(lambda x: (x > 0) + (x > 1), X)
    assert aten.logical_or.default in targets(program)
    flag = torch.rand(3, 4) > 0.5
    for function, left in [
        (lambda b: (b == True) & b, 1),  # noqa: E712
        (lambda b: (b == False) & b, 2),  # noqa: E712
        (lambda b: (b != False) & b, 1),  # noqa: E712
        (lambda b: (b != True) & b, 2),  # noqa: E712
    ]:
        assert len(calls(canonical(function, flag))) == left


def test_alpha_and_scales_are_written_out():
    for function in (
        lambda x: torch.add(x, x, alpha=2),
        lambda x: torch.sub(x, x, alpha=3),
        lambda x: torch.sub(x, 2.0, alpha=3),
        lambda x: torch.rsub(x, 2.0, alpha=3),
        lambda x: torch.rsub(x, x.exp(), alpha=3),
    ):
        for node in calls(canonical(function, X)):
            assert node.kwargs.get("alpha", 1) == 1 and len(node.args) < 3
    assert aten.elu.default not in targets(canonical(F.selu, X))
    assert targets(canonical(lambda x: F.elu(x, 0.5), X)) == [aten.elu.default]


def test_sizes_in_float_arithmetic_are_tensors():
    for function in (lambda x: x.sum(1) / x.shape[1], lambda x: x > x.shape[1]):
        program = canonical(function, X)
        for node in calls(program):
            if node.target in (aten.div.Tensor, aten.gt.Tensor):
                assert all(a.meta["val"].dtype == torch.float32 for a in node.all_input_nodes)
        x = torch.randn(2, 9, 4) * 9
        torch.testing.assert_close(program.run(x), function(x))


def test_integer_clamps_have_both_bounds():
    (node,) = calls(canonical(lambda x: x.clamp(max=3), int_input()))
    assert node.args[1:] == (torch.iinfo(torch.int64).min, 3)


def test_infinite_fills():
    program = canonical(lambda x: torch.full((x.shape[0], 1), float("-inf")) + x[:, :1, 0], X)
    fills = [n.args[1] for n in calls(program) if n.target == aten.full.default]
    assert fills == [1.0]


@pytest.mark.parametrize(
    "convolution,shape,padding",
    [
        (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 9, 8), [1, 1]),
        (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9), [2]),
        (nn.Conv1d(4, 6, 3, padding="valid", stride=2), (2, 4, 9), [0]),
    ],
)
def test_convolution_padding_in_numbers(convolution, shape, padding):
    (node,) = calls(canonical(convolution, torch.randn(shape)))
    assert node.target in (aten.conv1d.default, aten.conv2d.default)
    assert node.args[4] == padding


def test_uneven_same_padding_stays():
    program = canonical(nn.Conv1d(4, 6, 4, padding="same"), torch.randn(2, 4, 9))
    assert targets(program) == [aten.conv1d.padding]


def test_minilm(minilm):
    ones = torch.ones(1, 8, dtype=torch.long)
    example = {"input_ids": ones * 9, "attention_mask": ones, "token_type_ids": ones * 0}
    programs = import_torch(minilm, example)
    result = Canonicalize().run(programs, PassContext())
    program = result.programs["forward"]
    assert not {aten.clone.default, aten._assert_tensor_metadata.default} & set(targets(program))
    assert "remove_identity" in result.decisions[0].reason
    ids = torch.randint(0, 30000, (3, 11))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    got, expected = program.run(**call), programs["forward"].run(**call)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_a_view_of_a_removed_copy_may_copy(import_model, apply, targets, same_results):
    """Without the copy, the dims that the view joins no longer follow each other in memory."""

    class Repeated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.unsqueeze(-1).expand(*x.shape, 2).flatten(-2) + 1).transpose(1, 2).flatten(1)

    model = Repeated()
    result = apply(import_model(model, torch.randn(2, 5, 3)), Canonicalize())
    count = targets(result.programs["forward"])
    assert count["clone"] == 0 and count["reshape"] == 2
    same_results(model, result.programs["forward"], [(torch.randn(1, 1, 3),)])
