"""Pictures whose height and width are not known: resized, convolved and compiled as one region."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify

RESIZES = {
    "asymmetric floor, x3 x2": (
        'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
        "3.0, 2.0",
    ),
    "half pixel, x2": ('mode="nearest"', "2.0, 2.0"),
    "linear, x2 x3": ('mode="linear"', "2.0, 3.0"),
    "linear with corners, x0.5": (
        'mode="linear", coordinate_transformation_mode="align_corners"',
        "0.5, 0.5",
    ),
}


@pytest.fixture(scope="module")
def names() -> list[str]:
    return [f"y{i}" for i in range(len(RESIZES))]


def test_resizes_of_dynamic_sizes_are_compiled(
    names: list[str], write: Callable[..., Path], same_as_onnxruntime: Callable[..., None]
) -> None:
    declared = ", ".join(f"float[N, 3, a{i}, b{i}] y{i}" for i in range(len(RESIZES)))
    nodes = "".join(
        f"""s{i} = Constant<value = float[4] {{1.0, 1.0, {scales}}}>()
        y{i} = Resize<{options}>(x, , s{i})"""
        for i, (options, scales) in enumerate(RESIZES.values())
    )
    path = write(f"g (float[N, 3, H, W] x) => ({declared}) {{ {nodes} }}")
    compiled = sparsify.compile(path, cache=False, num_threads=1, strict=True)
    for shape in ((2, 3, 8, 6), (1, 3, 31, 17), (3, 3, 4, 33)):
        same_as_onnxruntime(compiled, path, {"x": torch.randn(shape)}, 1e-5)


def test_a_pyramid_of_dynamic_size_is_one_region(
    write: Callable[..., Path], same_as_onnxruntime: Callable[..., None]
) -> None:
    """Strided convolutions, their sizes by Shape, and what a detector adds on the way back up."""
    kernel = ", ".join(f"{0.1 * (i % 7) - 0.3:.1f}" for i in range(3 * 3 * 9))
    conv = "Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>"
    text = f"""g (float[N, 3, H, W] x) => (float[N, 3, h, w] y) {{
        k = Constant<value = float[3, 3, 3, 3] {{{kernel}}}>()
        a = {conv}(x, k)
        b = {conv}(a, k)
        full = Shape(a)
        up = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
                    nearest_mode = "floor">(b, , , full)
        y = Add(a, up)
    }}"""
    path = write(text)
    compiled = sparsify.compile(path, cache=False, num_threads=1, strict=True)
    for shape in ((2, 3, 16, 24), (1, 3, 37, 21), (1, 3, 10, 64)):
        same_as_onnxruntime(compiled, path, {"x": torch.randn(shape)}, 1e-5)


@pytest.mark.parametrize(
    ("mode", "coordinates", "scale"),
    [("cubic", "asymmetric", 2.0), ("linear", "half_pixel", 1.5)],
)
def test_a_resize_that_needs_static_sizes_names_the_way_out(
    capture: Callable[..., Any], mode: str, coordinates: str, scale: float
) -> None:
    text = f"""g (float[N, 3, H, W] x) => (float[N, 3, a, b] y) {{
        s = Constant<value = float[4] {{1.0, 1.0, 2.0, {scale}}}>()
        y = Resize<mode = "{mode}", coordinate_transformation_mode = "{coordinates}">(x, , s)
    }}"""
    told = r"(?s)Resize.*dynamic sizes.*Fix sizes \(x: \(N, 3, H, W\)\).*--shape name=1,3,224,224"
    with pytest.raises(ValueError, match=told):
        capture(text)
    capture(text, shapes={"x": (1, 3, 6, 7)})
