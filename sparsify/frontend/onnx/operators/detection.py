"""NonMaxSuppression, unrolled over boxes: their number must be static and small."""

from __future__ import annotations

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator

MOST_BOXES = 256
"""More are refused: each box becomes a part of the program."""


@operator("NonMaxSuppression", since=10, host=("most", "overlap", "lowest"))
def non_max_suppression(
    node: Node,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    most: np.ndarray | None = None,
    overlap: np.ndarray | None = None,
    lowest: np.ndarray | None = None,
) -> torch.Tensor:
    """Which boxes stay, ``[count, 3]`` of batch, class and box, best first in each class.

    Args:
        boxes: ``[batch, boxes, 4]``.
        scores: ``[batch, classes, boxes]``.
        most: boxes of a class that stay; overlap: over union, from which on a box goes;
            lowest: the score that a box must exceed.
    """
    count = boxes.shape[1]
    if not isinstance(count, int) or count > MOST_BOXES:
        raise Unsupported(f"{count} boxes; at most {MOST_BOXES} are served, of static number")
    limit = 0 if most is None else int(most.reshape(-1)[0])
    threshold = 0.0 if overlap is None else float(overlap.reshape(-1)[0])
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    shared = _overlaps(_corners(boxes, bool(node.get("center_point_box", 0)))).unsqueeze(1)
    index = order.unsqueeze(-1).expand(*order.shape, count)
    shared = shared.expand(*scores.shape[:2], count, count)
    shared = shared.gather(2, index).gather(3, index.transpose(2, 3))
    near = shared > threshold
    stays = torch.ones_like(ranked, dtype=torch.bool)
    if lowest is not None:
        stays = ranked > float(lowest.reshape(-1)[0])
    place = torch.arange(count)
    for i in range(count - 1):
        stays = stays & ~(near[:, :, i] & stays[:, :, i : i + 1] & (place > i))
    stays = stays & (stays.long().cumsum(-1) <= limit)
    found = torch.nonzero(stays)
    box = order[found[:, 0], found[:, 1], found[:, 2]]
    return torch.stack([found[:, 0], found[:, 1], box], 1)


def _corners(boxes: torch.Tensor, centred: bool) -> torch.Tensor:
    """``[..., 4]`` of the smaller and the larger corner."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if centred:
        return torch.cat([first - second / 2, first + second / 2], -1)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _overlaps(boxes: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each box with each other, ``[batch, boxes, boxes]``."""
    low, high = boxes[..., :2], boxes[..., 2:]
    area = (high - low).prod(-1)
    inner = torch.minimum(high.unsqueeze(2), high.unsqueeze(1)) - torch.maximum(
        low.unsqueeze(2), low.unsqueeze(1)
    )
    shared = inner.clamp(min=0).prod(-1)
    return shared / (area.unsqueeze(2) + area.unsqueeze(1) - shared)
