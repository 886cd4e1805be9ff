"""Reading pictures at computed places: GridSample, RoiAlign and DeformConv."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.convolution import padding
from sparsify.frontend.onnx.registry import Unsupported, operator

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


@operator("GridSample", since=16)
def grid_sample(node: Node, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    mode = node.get("mode", "linear")
    mode = _MODES.get(mode, mode)
    if x.dim() == 5 and mode == "bicubic":
        raise Unsupported("cubic samples of volumes")
    if x.dim() not in (4, 5):
        raise Unsupported(f"{x.dim() - 2} dims of places")
    corners = bool(node.get("align_corners", 0))
    return F.grid_sample(x, grid, mode, node.get("padding_mode", "zeros"), corners)


def bilinear(
    x: torch.Tensor, y_at: torch.Tensor, x_at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The four elements around each place, and their shares, which add up to one.

    Args:
        x: ``[groups, channels, height, width]``.
        y_at, x_at: ``[groups, places]``, in elements.

    Returns:
        Elements ``[4, groups, channels, places]``, those outside the input zero, and shares
        ``[4, groups, 1, places]``.
    """
    groups, channels, height, width = x.shape
    flat = x.reshape(groups, channels, height * width)
    top, left = y_at.floor(), x_at.floor()
    found, shares = [], []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = top + dy, left + dx
        inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
        place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
        part = flat.gather(2, place.unsqueeze(1).expand(-1, channels, -1))
        found.append(torch.where(inside.unsqueeze(1), part, 0.0))
        share = (1 - (y_at - row).abs()) * (1 - (x_at - column).abs())
        shares.append(share.unsqueeze(1))
    return torch.stack(found), torch.stack(shares)


@operator("RoiAlign", since=10)
def roi_align(
    node: Node, x: torch.Tensor, rois: torch.Tensor, batch_indices: torch.Tensor
) -> torch.Tensor:
    """Samples each region of interest on a grid; each result is of a cell's samples."""
    rows, columns = node.get("output_height", 1), node.get("output_width", 1)
    samples = node.get("sampling_ratio", 0)
    if samples <= 0:
        raise Unsupported("sampling_ratio 0, whose number of samples depends on the regions")
    half = node.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    if node.version < 16:
        half = False
    x1, y1, x2, y2 = (rois * node.get("spatial_scale", 1.0) - (0.5 if half else 0.0)).unbind(1)
    width, height = x2 - x1, y2 - y1
    if not half:
        width, height = width.clamp(min=1.0), height.clamp(min=1.0)

    def places(start: torch.Tensor, length: torch.Tensor, cells: int) -> torch.Tensor:
        step = (torch.arange(cells * samples) + 0.5) / (cells * samples)
        return start.unsqueeze(1) + length.unsqueeze(1) * step

    count = rois.shape[0]
    y_at, x_at = places(y1, height, rows), places(x1, width, columns)
    shape = (count, rows * samples, columns * samples)
    y_at = y_at.unsqueeze(2).expand(shape).reshape(count, -1)
    x_at = x_at.unsqueeze(1).expand(shape).reshape(count, -1)
    inside = (y_at >= -1) & (y_at <= x.shape[2]) & (x_at >= -1) & (x_at <= x.shape[3])
    y_at, x_at = y_at.clamp(0, x.shape[2] - 1), x_at.clamp(0, x.shape[3] - 1)
    elements, shares = bilinear(x.index_select(0, batch_indices.long()), y_at, x_at)
    weighted = torch.where(inside.unsqueeze(1), elements * shares, 0.0)
    average = node.get("mode", "avg") == "avg"
    # The greatest is taken of the weighted elements, before they are added up.
    value = weighted.sum(0) if average else weighted.amax(0)
    cells = value.reshape(count, x.shape[1], rows, samples, columns, samples)
    return cells.mean((3, 5)) if average else cells.amax((3, 5))


@operator("DeformConv", since=19)
def deform_conv(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """A convolution whose taps are moved by offsets, ``[batch, groups * taps * 2, *out]``."""
    if x.dim() != 4:
        raise Unsupported(f"{x.dim() - 2} dims of places")
    groups, moved = node.get("group", 1), node.get("offset_group", 1)
    strides, dilations = node.get("strides", [1, 1]), node.get("dilations", [1, 1])
    kernel = list(weight.shape[2:])
    (top, _), (left, _) = padding(node, x.shape[2:], kernel, strides, dilations)
    batch, channels = x.shape[:2]
    out, taps = list(offset.shape[2:]), math.prod(kernel)
    moves = offset.reshape(batch * moved, taps, 2, *out)

    def places(dim: int, begin: int) -> torch.Tensor:
        """Where the taps are without offsets, ``[taps, *out]`` by broadcasting."""
        tap = torch.arange(kernel[dim]) * dilations[dim]
        tap = tap.reshape((-1, 1) if dim == 0 else (1, -1)).expand(kernel).reshape(-1, 1, 1)
        at = torch.arange(out[dim]) * strides[dim] - begin
        return tap + at.reshape((-1, 1) if dim == 0 else (1, -1))

    y_at = (moves[:, :, 0] + places(0, top)).reshape(batch * moved, -1)
    x_at = (moves[:, :, 1] + places(1, left)).reshape(batch * moved, -1)
    source = x.reshape(batch * moved, channels // moved, *x.shape[2:])
    elements, shares = bilinear(source, y_at, x_at)
    values = (elements * shares).sum(0)
    if mask is not None:
        values = values * mask.reshape(batch * moved, 1, -1)
    values = values.reshape(batch, groups, channels // groups * taps, math.prod(out))
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    y = (matrix @ values).reshape(batch, weight.shape[0], *out)
    return y if bias is None else y + bias.reshape(-1, 1, 1)
