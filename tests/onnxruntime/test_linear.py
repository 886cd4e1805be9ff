"""Linears of the library: shapes, densities, storages, threads, and calls that overlap."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.ops import ACTIVATIONS

TOKENS = (1, 7, 16, 33, 64, 97, 128)
SHAPES = ((1, 1), (5, 3), (8, 16), (77, 55), (200, 301), (64, 700))
STORAGES = ("Csr", "Bitmap", "Dense")


def stored(weight: torch.Tensor, storage: str) -> dict[str, torch.Tensor]:
    """The tensors of the domain's storages."""
    bits = weight != 0
    values = weight[bits]
    if storage == "Csr":
        columns = bits.nonzero()[:, 1].int()
        offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int32)
        offsets[1:] = bits.sum(1).cumsum(0)
        return {"values": values, "columns": columns, "row_offsets": offsets}
    if storage == "Bitmap":
        packed = np.packbits(bits.numpy(), axis=1, bitorder="little")
        return {"bits": torch.from_numpy(packed), "values": values}
    return {"weight": weight}


def sparse(shape: tuple[int, int], density: float) -> torch.Tensor:
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    if 0 < density < 1:
        weight[shape[0] // 2] = 0  # an empty row
    return weight


def linear(weight: torch.Tensor, storage: str, kind: str) -> tuple[str, dict[str, Any]]:
    """The operator's name and its attributes."""
    activation = kind.removesuffix("Add").lower() or "none"
    out_features, in_features = weight.shape
    attributes = {
        "out_features": out_features,
        "in_features": in_features,
        "storage": storage.lower(),
        "activation": activation,
    }
    return f"Linear{storage}Bias{kind}", attributes


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kind: str, residual: torch.Tensor
) -> torch.Tensor:
    activate = ACTIVATIONS[kind.removesuffix("Add").lower() or "none"]
    y = activate(x.double() @ weight.double().T + bias.double())
    return y + residual.double() if kind.endswith("Add") else y


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_any_shape_and_any_number_of_tokens(
    storage: str, density: float, model: Callable[..., bytes], session: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    for number, shape in enumerate(SHAPES):
        kind = ("", "Gelu", "Add", "ReluAdd")[number % 4]
        weight, bias = sparse(shape, density), torch.randn(shape[0])
        name, attributes = linear(weight, storage, kind)
        sizes = {"x": torch.empty(1, shape[1]), "residual": torch.empty(1, shape[0])}
        file = model(name, {**sizes, "bias": bias, **stored(weight, storage)}, attributes, 2)
        for threads in (1, 2):
            made = session(file, threads)
            for tokens in TOKENS:
                x, residual = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
                feeds = {"x": x.numpy(), "residual": residual.numpy()}
                given = {i.name: feeds[i.name] for i in made.get_inputs()}
                (y,) = made.run(None, given)
                expected = reference(x, weight, bias, kind, residual)
                torch.testing.assert_close(
                    torch.from_numpy(y).double(), expected, atol=2e-4, rtol=1e-4
                )


def test_leading_dims_are_kept_and_may_be_empty(
    model: Callable[..., bytes], session: Callable[..., Any]
) -> None:
    weight, bias = sparse((20, 12), 0.3), torch.randn(20)
    name, attributes = linear(weight, "Csr", "")
    file = model(name, {"x": torch.empty(1, 1, 12), "bias": bias, **stored(weight, "Csr")},
                 attributes, 3)  # fmt: skip
    made = session(file)
    for leading in ((2, 3), (1, 1), (0, 4), (3, 0), (5, 17)):
        x = torch.randn(*leading, 12)
        (y,) = made.run(None, {"x": x.numpy()})
        assert y.shape == (*leading, 20)
        assert np.allclose(y, (x @ weight.T + bias).numpy(), atol=1e-4)


def test_a_weight_that_is_an_input_is_packed_at_each_call(
    model: Callable[..., bytes], session: Callable[..., Any]
) -> None:
    name, attributes = linear(torch.empty(9, 11), "Csr", "")
    made = None
    for density in (0.2, 0.9, 0.0):
        weight, bias = sparse((9, 11), density), torch.randn(9)
        inputs = {"x": torch.randn(6, 11), "bias": bias, **stored(weight, "Csr")}
        made = made or session(model(name, inputs, attributes, 2, constant=False))
        (y,) = made.run(None, {n: t.numpy() for n, t in inputs.items()})
        assert np.allclose(y, (inputs["x"] @ weight.T + bias).numpy(), atol=1e-5)


def test_inputs_need_no_alignment(model: Callable[..., bytes], session: Callable[..., Any]) -> None:
    weight, bias = sparse((40, 32), 0.3), torch.randn(40)
    name, attributes = linear(weight, "Bitmap", "Add")
    sizes = {"x": torch.empty(1, 32), "residual": torch.empty(1, 40)}
    made = session(model(name, {**sizes, "bias": bias, **stored(weight, "Bitmap")}, attributes, 2))
    x, residual = (torch.randn(33 * n + 1)[1:].reshape(33, n) for n in (32, 40))
    (y,) = made.run(None, {"x": x.numpy(), "residual": residual.numpy()})
    assert np.allclose(y, (x @ weight.T + bias + residual).numpy(), atol=1e-4)


def test_calls_of_several_threads_may_overlap(
    model: Callable[..., bytes], session: Callable[..., Any]
) -> None:
    weight, bias = sparse((96, 64), 0.2), torch.randn(96)
    name, attributes = linear(weight, "Csr", "Gelu")
    file = model(name, {"x": torch.empty(1, 64), "bias": bias, **stored(weight, "Csr")},
                 attributes, 2)  # fmt: skip
    made = session(file, 2)
    inputs = [torch.randn(1 + 7 * i, 64) for i in range(8)]
    expected = [reference(x, weight, bias, "Gelu", x).float().numpy() for x in inputs]

    def call(number: int) -> bool:
        index = number % len(inputs)
        (y,) = made.run(None, {"x": inputs[index].numpy()})
        return bool(np.allclose(y, expected[index], atol=1e-4))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(120)))


def test_a_wrong_number_of_features_is_an_error(
    model: Callable[..., bytes], session: Callable[..., Any]
) -> None:
    weight = sparse((6, 10), 0.5)
    name, attributes = linear(weight, "Csr", "")
    inputs = {"x": torch.empty(1, 10), "bias": torch.randn(6), **stored(weight, "Csr")}
    made = session(model(name, inputs, attributes, 2))
    with pytest.raises(Exception, match=f"{name}: x has 9 features, the weight takes 10"):
        made.run(None, {"x": np.zeros((3, 9), np.float32)})
