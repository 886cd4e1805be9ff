"""Masks of real models and small modules: the graph after, its meaning, and each near miss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsify.contracts import PassContext
from sparsify.frontend.torch import import_torch
from sparsify.passes.simplify_masks import SimplifyMasks

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def simplify(programs):
    before = str(programs["forward"].graph)
    result = SimplifyMasks().run(programs, PassContext())
    assert str(programs["forward"].graph) == before
    return result.programs["forward"], result.decisions


def targets(program):
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def attention(program):
    (node,) = [n for n in program.graph.nodes if n.target == SDPA]
    return node


class Attend(nn.Module):
    """Attention of x [b, s, 8] with itself under a mask that ``build(x, keep)`` makes."""

    def __init__(self, build):
        super().__init__()
        self.build = build

    def forward(self, x, keep):
        h = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mask = self.build(self, x, keep)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=mask).transpose(1, 2).flatten(2)


def run(build, setup=None, exact=True):
    """Simplifies one mask; returns its attention node, decision, and the new program."""
    torch.manual_seed(0)
    model = Attend(build)
    if setup is not None:
        setup(model)
    keep = torch.ones(2, 6, dtype=torch.long)
    programs = import_torch(model, (torch.randn(2, 6, 8), keep))
    program, decisions = simplify(programs)
    for batch, length in [(1, 1), (3, 5)]:
        x = torch.randn(batch, length, 8)
        keep = torch.ones(batch, length, dtype=torch.long)
        keep[-1, length // 2 + 1 :] = 0
        expected = programs["forward"].run(x, keep)
        torch.testing.assert_close(program.run(x, keep), expected, rtol=1e-5, atol=1e-6)
    decisions = [d for d in decisions if d.operator == "attention"]
    return attention(program), decisions[0] if decisions else None, program


def length(x):
    return torch.arange(x.shape[1])


def test_minilm_has_no_square_mask(minilm):
    ones = torch.ones(1, 8, dtype=torch.long)
    example = {"input_ids": ones * 9, "attention_mask": ones, "token_type_ids": ones * 0}
    programs = import_torch(minilm, example)
    assert aten.index.Tensor in targets(programs["forward"])
    program, decisions = simplify(programs)
    gone = {aten.index.Tensor, aten.arange.start_step, aten.bitwise_and.Tensor, aten.expand.default}
    assert not gone & set(targets(program))
    masks = [n.args[3] for n in program.graph.nodes if n.target == SDPA]
    assert len(masks) == 6 and len(set(masks)) == 1
    _, one, also_one, keys = masks[0].meta["val"].shape
    assert (one, also_one) == (1, 1)
    for node in program.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        assert sum(str(d) == str(keys) for d in shape) < 2, node
    assert sum(d.verdict == "rewritten" for d in decisions) == 7
    assert decisions[1].site == "encoder.layer.0.attention.self"
    for count, size in [(1, 1), (3, 33)]:
        ids = torch.randint(0, 30000, (count, size))
        keep = (torch.arange(size) < torch.randint(1, size + 1, (count, 1))).long()
        call = {"input_ids": ids, "attention_mask": keep, "token_type_ids": ids * 0}
        got, expected = program.run(**call), programs["forward"].run(**call)
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_llama_without_mask_is_causal():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).eval()
    call = {"input_ids": torch.randint(0, 50, (2, 7))}
    programs = import_torch(model, call)
    program, _ = simplify(programs)
    got, expected = program.run(**call)[0], programs["forward"].run(**call)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    node = attention(program)
    assert node.args[3] is None and node.args[5] is True


@pytest.mark.parametrize(
    "build",
    [
        lambda m, x, k: length(x)[None, :] <= length(x)[:, None],
        lambda m, x, k: (length(x)[:, None] >= length(x)[None, :]).expand(x.shape[0], 1, -1, -1),
        lambda m, x, k: length(x)[None, :] < length(x)[:, None] + 1,
        lambda m, x, k: ~(length(x)[None, :] > length(x)[:, None]),
        lambda m, x, k: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
        lambda m, x, k: m.triangle[None, : x.shape[1], : x.shape[1]],
    ],
    ids=["le", "ge-expanded", "lt", "not-gt", "tril", "stored"],
)
def test_causal_masks(build):
    def setup(m):
        m.register_buffer("triangle", torch.ones(16, 16, dtype=torch.bool).tril())

    node, decision, _ = run(build, setup)
    assert node.args[3] is None and node.args[5] is True
    assert decision.verdict == "rewritten" and "is_causal" in decision.reason


@pytest.mark.parametrize(
    "build",
    [
        lambda m, x, k: torch.ones(1, x.shape[1], dtype=torch.bool),
        lambda m, x, k: (length(x) >= 0).expand(x.shape[0], 1, x.shape[1], -1),
        lambda m, x, k: (length(x) > -1)[None, :] | (k[:, None, None, :] > 3),
        lambda m, x, k: torch.zeros(x.shape[1], x.shape[1]),
    ],
    ids=["ones", "ge-zero", "or-true", "added-zeros"],
)
def test_masks_that_hide_nothing(build):
    node, decision, _ = run(build)
    assert node.args[3] is None and node.args[5] is False
    assert "hides nothing" in decision.reason


def test_key_mask_loses_its_expansion_and_true():
    def build(m, x, k):
        full = torch.full((), True) & (length(x)[:, None] >= 0)
        rows = torch.arange(x.shape[0])[:, None, None, None]
        keep = k.bool()[rows, length(x)[None, None, None, :]]
        return (full & keep).expand(x.shape[0], -1, x.shape[1], x.shape[1])

    node, _, program = run(build)
    assert node.args[3].meta["val"].shape[1:3] == (1, 1)
    assert aten.index.Tensor not in targets(program)
    assert aten.arange.start_step not in targets(program)


def test_index_with_swapped_dims_is_a_permutation():
    def build(m, x, k):
        table = k.bool().t().contiguous()
        rows = torch.arange(x.shape[0])[:, None]
        return table[length(x)[None, :], rows][:, None, None, :]

    _, _, program = run(build)
    assert aten.index.Tensor not in targets(program)


def test_expanded_float_mask_reads_thin():
    class Added(nn.Module):
        def forward(self, scores, keep):
            bias = torch.where(keep, 0.0, -1e9)[:, None, :].expand(-1, scores.shape[1], -1)
            return scores + bias

    programs = import_torch(Added(), (torch.randn(2, 5, 4), torch.ones(2, 4, dtype=torch.bool)))
    program, _ = simplify(programs)
    assert aten.expand.default not in targets(program)
    scores, keep = torch.randn(3, 2, 4), torch.rand(3, 4) > 0.5
    assert torch.equal(program.run(scores, keep), programs["forward"].run(scores, keep))


class Read(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return self.index(x) * 2


@pytest.mark.parametrize(
    "index,reason",
    [
        (lambda x: x[torch.arange(1, 3), torch.arange(2)], "same dim"),
        (lambda x: x[torch.arange(1, x.shape[0])], "starts at 1"),
        (lambda x: x[torch.arange(x.shape[0] - 1)], "does not cover"),
        (lambda x: x[:, torch.arange(x.shape[1])], "others are not"),
        (
            lambda x: x[torch.arange(x.shape[0])[:, None].expand(-1, 3)],
            "read more than once",
        ),
    ],
)
def test_indices_that_are_no_view(index, reason):
    programs = import_torch(Read(index), (torch.randn(4, 4),))
    program, decisions = simplify(programs)
    (decision,) = decisions
    assert decision.verdict == "skipped" and reason in decision.reason
    x = torch.randn(4, 4)
    assert torch.equal(program.run(x), programs["forward"].run(x))
