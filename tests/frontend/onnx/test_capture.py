"""What an ONNX graph becomes under torch.export, and what is said about those that cannot."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch

import sparsify
from sparsify.frontend.onnx.capture import capture_onnx

SHAPE_CHAIN = """g (float[N,"L",6] x) => (float[N,K] y)
<int64[1] six = {6}, int64[1] rest = {-1}>
{
    batch = Shape<start = 0, end = 1>(x)
    s = Shape(x)
    one = Constant<value_int = 1>()
    length = Gather<axis = 0>(s, one)
    zero = Constant<value = int64[1] {0}>()
    column = Unsqueeze(length, zero)
    width = Mul(column, six)
    wanted = Concat<axis = 0>(batch, width)
    y = Reshape(x, wanted)
}"""


def operators(exported) -> Counter[str]:
    return Counter(str(n.target) for n in exported.graph.nodes if n.op == "call_function")


def test_a_chain_of_shapes_is_calculated_while_tracing(capture) -> None:
    exported = capture(SHAPE_CHAIN.replace('"L"', "L"))
    assert set(operators(exported)) <= {
        "aten.reshape.default",
        "aten.sym_size.int",
        "<built-in function mul>",
    }
    for shape in ((1, 1, 6), (3, 5, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x)["y"], x.flatten(1))


def test_sizes_stay_dynamic_where_a_constant_is_sliced_and_gathered(capture) -> None:
    exported = capture(
        """g (float[N,L] x) => (float[N,L] y)
        <float[8] table = {0, 1, 2, 3, 4, 5, 6, 7}, int64[1] zero = {0}, int64[1] one = {1}>
        {
            length = Shape<start = 1, end = 2>(x)
            part = Slice(table, zero, length, zero, one)
            y = Add(x, part)
        }""",
        shapes={"x": ("N", "L")},
        example_inputs=(torch.zeros(2, 5),),
    )
    for length in (1, 3, 8):
        x = torch.zeros(1, length)
        assert exported.module()(x)["y"].tolist() == [list(map(float, range(length)))]


def test_a_constant_condition_takes_its_branch(capture) -> None:
    text = """g (float[N] x) => (float[N] y)
    <bool flag = {1}>
    {
        y = If(flag) <
            then_branch = a () => (float[N] u) { u = Neg(x) },
            else_branch = b () => (float[N] v) { v = NotAnOperator(x) }
        >
    }"""
    assert operators(capture(text)) == {"aten.neg.default": 1}


def test_an_input_can_be_fixed_to_a_constant(capture) -> None:
    text = """g (float[N] x, int64 rate) => (float[N] y)
    <int64 wide = {16000}>
    {
        is_wide = Equal(rate, wide)
        y = If(is_wide) <
            then_branch = a () => (float[N] u) { u = Neg(x) },
            else_branch = b () => (float[N] v) { v = Abs(x) }
        >
    }"""
    with pytest.raises(ValueError, match=r"If.*condition is computed from the model's inputs"):
        capture(text)
    for rate, expected in ((16000, "aten.neg.default"), (8000, "aten.abs.default")):
        exported = capture(text, constants={"rate": rate})
        assert operators(exported) == {expected: 1}
        assert exported.graph_signature.user_inputs == ("x",)


def test_functions_of_the_model_are_inlined(capture) -> None:
    text = """g (float[N] x) => (float[N] y) { y = own.Twice(x) }
    <domain: "own", opset_import: ["" : 17]>
    Twice (a) => (b) { b = Add(a, a) }"""
    assert operators(capture(text, more=', "own" : 1')) == {"aten.add.Tensor": 1}


def test_functions_of_other_operator_versions_run_at_their_own(capture) -> None:
    """Axes of ReduceMax and Squeeze are attributes in version 11 and inputs in 18."""
    text = """g (float[N,1,4] x) => (float[N,4] y, float[N,1] z)
    {
        y = own.Centre <scale = 3.0> (x)
        axes = Constant <value_ints = [1]> ()
        z = ReduceMax <keepdims = 1> (y, axes)
    }
    <domain: "own", opset_import: ["" : 11, "own" : 1]>
    Centre <scale> (a) => (c)
    {
        flat = Squeeze <axes = [1]> (a)
        scaled = own.Scale <by: float = @scale> (flat)
        top = ReduceMax <axes = [1], keepdims = 1> (scaled)
        c = Sub(scaled, top)
    }
    <domain: "own", opset_import: ["" : 12]>
    Scale <by> (a, absent) => (b)
    {
        factor = Constant <value_float: float = @by> ()
        b = Mul(a, factor)
    }"""
    exported = capture(text, opset=18, more=', "own" : 1')
    x = torch.randn(5, 1, 4)
    found = exported.module()(x)
    scaled = 3 * x[:, 0]
    torch.testing.assert_close(found["y"], scaled - scaled.amax(1, keepdim=True))
    torch.testing.assert_close(found["z"], torch.zeros(5, 1))


def test_nodes_of_functions_that_cannot_be_imported_are_listed(capture) -> None:
    text = """g (float[N] x) => (float[N] y) { a = own.F(x) y = own.F(a) }
    <domain: "own", opset_import: ["" : 11]>
    F (a) => (b) { b = NotAnOperator(a) }"""
    with pytest.raises(ValueError, match=r"NotAnOperator \(version 11\) 'b': has no handler"):
        capture(text, more=', "own" : 1')


def test_one_error_lists_every_operator_that_is_missing(capture) -> None:
    text = """g (float[N] x) => (float[N] y)
    {
        a = odd.First(x)
        b = Relu(a)
        c = Slop(b)
        d = Neg(x)
        y = odd.Second(d, c)
    }"""
    with pytest.raises(ValueError, match="3 nodes cannot be imported") as caught:
        capture(text, more=', "odd" : 2')
    message = str(caught.value)
    for part in (
        "odd::First (version 2) 'a': has no handler",
        "ai.onnx::Slop (version 17) 'c'",
        "odd::Second (version 2) 'y'",
    ):
        assert part in message
    assert "Relu" not in message and "Neg" not in message


def test_a_node_out_of_order_is_named(capture) -> None:
    with pytest.raises(ValueError, match=r"'b' is read before any node computes it"):
        capture("g (float[N] x) => (float[N] a) { a = Add(x, b) b = Neg(a) }")


@pytest.mark.parametrize(
    ("declared", "body"),
    [
        ("float[1099511627776] x", "y = Relu(x)"),
        ("float[N] x", "z = ConstantOfShape(huge) y = Add(x, z)"),
        ("float[N,1] x", "y = Expand(x, huge)"),
        ("float[N,1] x", "z = Tile(x, two) y = Neg(z)"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_computed(capture, declared, body) -> None:
    text = f"""g ({declared}) => (float[M] y)
    <int64[1] huge = {{1099511627776}}, int64[2] two = {{1, 1099511627776}}> {{ {body} }}"""
    with pytest.raises(ValueError, match="GiB"):
        capture(text)


def test_names_of_inputs_and_outputs_are_those_of_the_file(write) -> None:
    path = write("g (float[N,4] a, float[N,4] class) => (float[N,4] y, float[N,4] s)" + (
        "{ y = Add(a, class) s = Sub(a, class) }"
    ))  # fmt: skip
    proto = onnx.load(path)
    proto.graph.input[0].name, proto.graph.output[0].name = "input.1", "out/0"
    for node in proto.graph.node:
        node.input[0] = "input.1"
    proto.graph.node[0].output[0] = "out/0"
    onnx.save(proto, path)
    compiled = sparsify.compile(path, num_threads=1)
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    found = compiled(input_1=a, input_class=b)
    assert list(found) == ["out/0", "s"]
    torch.testing.assert_close(found["out/0"], a + b)
    torch.testing.assert_close(compiled(a, b)["s"], a - b)


def test_dims_of_one_name_are_one_size_and_shapes_fix_them(capture) -> None:
    text = "g (float[N,4] a, float[N,M] b) => (float[N,4] y, float[N,M] z)" + (
        "{ y = Neg(a) z = Neg(b) }"
    )
    exported = capture(text)
    with pytest.raises(AssertionError, match="Guard failed"):
        exported.module()(torch.randn(2, 4), torch.randn(3, 5))
    fixed = capture(text, shapes={"a": (1, 4), "b": (1, None)})
    assert len(fixed.range_constraints) == 1
    with pytest.raises(ValueError, match=r"'a' cannot have the shape \(2, 5\)"):
        capture(text, shapes={"a": (2, 5)})
    with pytest.raises(ValueError, match=r"has no input 'c'; its inputs are a, b"):
        capture(text, shapes={"c": (2, 5)})


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(x, w)",
        "t = Transpose<perm = [1, 0]>(v) y = MatMul(x, t)",
        "y = Gemm<transB = 1>(x, v)",
        "y = Gemm<alpha = 2.0, beta = 0.5>(x, w, c)",
        "m = MatMul(x, w) y = Add(m, c)",
        "m = MatMul(x, w) y = Add(c, m)",
        "t = Transpose<perm = [1, 0]>(x) z = MatMul(v, t) y = Transpose<perm = [1, 0]>(z)",
    ],
)
def test_products_with_a_weight_are_linear_layers(
    capture, write, same_as_onnxruntime, body
) -> None:
    w = ", ".join(str(0.25 * ((5 * i) % 7 - 3)) for i in range(12))
    text = f"""g (float[N,4] x) => (float[N,3] y)
    <float[4,3] w = {{{w}}}, float[3,4] v = {{{w}}}, float[3] c = {{1, 2, 3}}> {{ {body} }}"""
    exported = capture(text)
    linear = [n for n in exported.graph.nodes if n.target == torch.ops.aten.linear.default]
    assert [tuple(n.args[1].meta["val"].shape) for n in linear] == [(3, 4)]
    path = write(text)
    same_as_onnxruntime(exported.module(), path, {"x": torch.randn(5, 4)}, 1e-6)
    compiled = sparsify.compile(path, num_threads=1, strict=True)
    same_as_onnxruntime(compiled, path, {"x": torch.randn(9, 4)}, 1e-6)


def test_weights_are_called_like_the_modules_that_they_come_from(tmp_path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    path = tmp_path / "net.onnx"
    torch.onnx.export(Net(), (torch.randn(2, 5, 4),), path, dynamo=False)
    names = set(capture_onnx(path).state_dict)
    assert names == {f"head.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
