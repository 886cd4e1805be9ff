"""The PyTorch frontend: dynamic sizes, weights as inputs, the user's module untouched."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export.graph_signature import InputKind

from sparsify.frontend.torch import capture, import_torch, normalise
from sparsify.rewriter import Rewriter

aten = torch.ops.aten


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = (
            nn.Linear(6, 8),
            nn.Dropout(0.5),
            nn.Linear(8, 6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(F.gelu(self.up(x)))) + x


def sizes(program):
    return {n.name: tuple(n.meta["val"].shape) for n in program.user_inputs()}


def close(got, expected, tolerance=1e-6):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch,length", [(1, 1), (1, 9), (5, 1), (3, 7)])
def test_unit_example_serves_every_batch_and_length(batch, length):
    model = Mlp().eval()
    program = import_torch(model, (torch.randn(1, 1, 6),))["forward"]
    x = torch.randn(batch, length, 6)
    close(program.run(x), model(x))
    assert {int(r.lower) for r in program.exported.range_constraints.values()} == {1}
    assert sizes(program)["x"][2] == 6


def test_static_shapes():
    program = import_torch(Mlp(), (torch.randn(1, 3, 6),), dynamic_shapes=None)["forward"]
    assert sizes(program) == {"x": (1, 3, 6)}
    assert not program.exported.range_constraints


def test_explicit_dynamic_shapes():
    spec = {"x": {1: torch.export.Dim("length", max=64)}}
    program = import_torch(Mlp(), (torch.randn(2, 3, 6),), dynamic_shapes=spec)["forward"]
    shape = sizes(program)["x"]
    assert shape[0] == 2 and isinstance(shape[1], torch.SymInt)


def test_unknown_dynamic_shapes_word():
    with pytest.raises(ValueError, match="'automatic' is unknown"):
        import_torch(Mlp(), (torch.randn(2, 6),), dynamic_shapes="automatic")


def test_dims_that_must_be_one_stay_one():
    class Mono(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 3, 2)

        def forward(self, x):
            return self.conv(x)

    model = Mono().eval()
    program = import_torch(model, (torch.randn(1, 1, 8),))["forward"]
    shape = sizes(program)["x"]
    assert isinstance(shape[0], torch.SymInt) and shape[1] == 1
    close(program.run(torch.randn(3, 1, 5) * 0 + 1), model(torch.ones(3, 1, 5)))


def test_unit_dim_that_broadcasts_is_not_specialised_to_its_widened_size():
    class Scale(nn.Module):
        def forward(self, x, scale):
            return x * scale

    program = import_torch(Scale(), (torch.randn(4, 2), torch.randn(4, 1)))["forward"]
    x, scale = torch.randn(3, 2), torch.randn(3, 1)
    close(program.run(x, scale), x * scale)


def test_a_batch_of_one_is_served_although_other_sizes_are_bound():
    """At their least, 2, the other sizes do not run; as in the examples they do."""

    class Halves(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x[:, ::2], x[:, ::8].repeat_interleave(4, 1)])

    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(Halves(), (torch.randn(2, 16),), dynamic_shapes=dims)
    program = import_torch(exported)["forward"]
    batch = program.user_inputs()[0].meta["val"].shape[0].node.expr
    assert int(program.exported.range_constraints[batch].lower) == 1


def test_bound_stays_where_python_branched_on_size_one():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] == 1 else x + 1

    program = import_torch(Branch(), (torch.randn(4, 3),))["forward"]
    bounds = {str(s): int(r.lower) for s, r in program.exported.range_constraints.items()}
    rows, columns = (str(d) for d in sizes(program)["x"])
    assert bounds == {rows: 2, columns: 1}
    x = torch.randn(3, 1)
    close(program.run(x), x + 1)


def test_mask_indexed_by_iota_shares_the_batch():
    class Mask(nn.Module):
        def forward(self, ids, mask):
            rows = torch.arange(ids.shape[0])[:, None]
            return mask[rows, torch.arange(ids.shape[1])[None, :]] * ids

    inputs = (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
    program = import_torch(Mask(), inputs)["forward"]
    assert sizes(program)["ids"] == sizes(program)["mask"]
    with pytest.raises(RuntimeError, match=r"args\[1\].shape\[0\] to be equal to 2, but got 4"):
        program.run(inputs[0], torch.ones(4, 5, dtype=torch.long))


def test_weights_buffers_and_constants_are_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10)
            self.head.weight = self.embed.weight
            self.register_buffer("kept", torch.ones(4))
            self.register_buffer("passing", torch.full((4,), 3.0), persistent=False)
            self.unused = nn.Linear(3, 3)

        def forward(self, ids):
            with torch.no_grad():
                x = self.embed(ids) * self.passing + self.kept
            return {
                "logits": self.head(x + torch.tensor([1.0, 2.0, 3.0, 4.0])),
                "none": None,
            }

    model = Tied().eval()
    program = import_torch(model, {"ids": torch.arange(6).view(2, 3)})["forward"]
    kinds = {s.kind for s in program.exported.graph_signature.input_specs}
    assert kinds == {InputKind.PARAMETER, InputKind.USER_INPUT}
    names = set(program.weights)
    assert {"head.bias", "kept", "passing"} < names and len(names) == 5
    assert not names & {"unused.weight", "unused.bias"}
    assert len({"embed.weight", "head.weight"} & names) == 1
    assert not any(w.requires_grad for w in program.weights.values())
    assert program.exported.constants == {}
    ids = torch.randint(0, 10, (1, 7))
    got = program.run(ids=ids)
    assert got["none"] is None
    close(got["logits"], model(ids)["logits"])


def test_argument_called_like_a_builtin_survives_rewriting():
    program = import_torch(nn.Linear(3, 2), (torch.randn(2, 3),))["forward"]
    again = Rewriter(Rewriter(program).finish()).finish()
    x = torch.randn(1, 3)
    assert torch.equal(again.run(x), program.run(x))
    named = Rewriter(import_torch(nn.Linear(3, 2), {"input": x})["forward"]).finish()
    assert named.run(input=x).shape == (1, 2)


def test_composite_operators_stay_whole():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.proj, self.rms = (
                nn.LayerNorm(8),
                nn.Linear(8, 8),
                nn.RMSNorm(8),
            )
            self.conv = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            h = self.proj(self.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2)
            h = F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)
            h = self.rms(F.silu(h) + F.gelu(x))
            return torch.softmax(h @ h.transpose(1, 2), -1), self.conv(h.transpose(1, 2))

    model = Block().eval()
    program = import_torch(model, (torch.randn(2, 5, 8),))["forward"]
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert targets >= {
        aten.linear.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.scaled_dot_product_attention.default,
        aten.gelu.default,
        aten.silu.default,
        aten.softmax.int,
        aten.matmul.default,
        aten.conv1d.default,
    }
    x = torch.randn(1, 9, 8)
    for got, expected in zip(program.run(x), model(x), strict=True):
        close(got, expected, 1e-5)


def test_torch_encoder_layer_is_not_one_opaque_operator():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    program = import_torch(model, (torch.randn(2, 5, 8),))["forward"]
    assert sum(n.target == aten.linear.default for n in program.graph.nodes) >= 3
    assert torch.backends.mha.get_fastpath_enabled()


def test_module_modes_are_restored():
    model = Mlp().train()
    model.down.eval()
    program = import_torch(model, (torch.randn(2, 6),))["forward"]
    assert (model.training, model.drop.training, model.down.training) == (
        True,
        True,
        False,
    )
    x = torch.randn(4, 6)
    close(program.run(x), model.eval()(x))


def test_failed_export_restores_modes():
    class Data(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    model = Data().train()
    with pytest.raises(ValueError):
        import_torch(model, (torch.randn(2, 6),))
    assert model.training


def test_graph_module_and_exported_program():
    model = Mlp().eval()
    x = torch.randn(2, 3, 6)
    traced = fx.symbolic_trace(model)
    close(import_torch(traced, (x,))["forward"].run(x), model(x))
    dynamic = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    exported = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    program = import_torch(exported)["forward"]
    one = torch.randn(1, 1, 6)
    close(program.run(one), model(one))
    again = import_torch(exported.module(), (x,))["forward"]
    close(again.run(x), model(x))


def test_exported_no_grad_region_is_inlined():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mlp()

        def forward(self, x):
            with torch.no_grad():
                h = self.inner(x)
            return self.inner(h)

    model = Frozen().eval()
    exported = torch.export.export(model, (torch.randn(2, 6),))
    x = torch.randn(2, 6)
    close(import_torch(exported)["forward"].run(x), model(x))


def test_capture_is_repeatable_and_stages_compose():
    model, x = Mlp().eval(), torch.randn(2, 6)
    first, second = capture(model, (x,)), capture(model, (x,))
    assert str(first.graph) == str(second.graph)
    close(normalise(first)["forward"].run(x), model(x))


def test_minilm_serves_all_sizes(minilm):
    ones = torch.ones(1, 8, dtype=torch.long)
    example = {
        "input_ids": ones * 9,
        "attention_mask": ones,
        "token_type_ids": ones * 0,
    }
    program = import_torch(minilm, example)["forward"]
    for batch, length in [(1, 1), (16, 3), (1, 512), (3, 33)]:
        ids = torch.randint(0, 30000, (batch, length))
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        call = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
        with torch.no_grad():
            expected = minilm(**call)
        got = program.run(**call)
        close(got.last_hidden_state, expected.last_hidden_state, 1e-5)
        close(got.pooler_output, expected.pooler_output, 1e-5)
