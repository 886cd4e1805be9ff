"""The windows that a model's attention asked for, against those that its configuration has.

Some models of transformers hand a window to the attention, others put it into the mask alone,
which a captured program does not have. A few tokens would not tell: they fit into any window.
"""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from sparsify import ops

_LAYER, _WINDOW = 6, 10
"""Positions among the operands of ``paged_attention``."""


def check_windows(model: Any, exported: ExportedProgram) -> None:
    """Raises ValueError, naming the layer, unless each layer attends over the window it has."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    for node in exported.graph.nodes:
        if node.target != ops.paged_attention.overload:
            continue
        layer = node.args[_LAYER]
        found = node.args[_WINDOW] if len(node.args) > _WINDOW else node.kwargs.get("window", 0)
        slides = kinds is None or kinds[layer] == "sliding_attention"
        wanted = window if slides else 0
        if found != wanted:
            raise ValueError(
                f"{type(model).__name__}: layer {layer} has a window of {wanted or 'all'} tokens "
                f"by its configuration, its attention asks for {found or 'all'}; a window that is "
                "in the mask alone cannot be captured"
            )
