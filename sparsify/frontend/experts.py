"""How experts of Hugging Face models are led to the operator, without a change to their code.

    self.experts(hidden_states, top_k_index, top_k_weights)   -> sparsify::experts

Modules of experts ask the experts interface of transformers how to compute. Those that compute
more than the operator can (a clamp, a norm behind the experts) go on as the model had them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.ops import ACTIVATIONS

NAME = "sparsify_experts"
"""Our experts in transformers."""

_PLAIN = "batched_mm"
"""How transformers computes what we do not, in a form that torch.export can trace."""


def activation_name(function: Any) -> str | None:
    """The name in `ACTIVATIONS` of what a module computes, by what it makes of some numbers."""
    x = torch.linspace(-6, 6, 257)
    with torch.no_grad():
        try:
            y = function(x)
        except Exception:
            return None
    for name, known in ACTIVATIONS.items():
        if (
            isinstance(y, torch.Tensor)
            and y.shape == x.shape
            and torch.allclose(y, known(x), 0, 1e-6)
        ):
            return name
    return None


@dataclass(frozen=True, eq=False)
class _Experts:
    """What the interface calls: experts of the modules whose activation is known.

    Attributes:
        activations: by the module's id; found before the export, which runs nothing.
    """

    activations: dict[int, str | None]

    def __call__(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        activation = self.activations[id(module)]
        if activation is None:
            plain = ALL_EXPERTS_FUNCTIONS[_PLAIN]
            return plain(module, hidden_states, top_k_index, top_k_weights, *args, **kwargs)
        prefix = "gate_up_proj" if module.has_gate else "up_proj"
        up, down = getattr(module, prefix), module.down_proj
        if module.is_transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        bias = (getattr(module, f"{prefix}_bias"), module.down_proj_bias) if module.has_bias else ()
        found: torch.Tensor = torch.ops.sparsify.experts(
            hidden_states, top_k_index.to(torch.int32), top_k_weights, [up], [down], list(bias),
            "dense", "dense", up.shape[0], down.shape[1], down.shape[2], up.shape[2],
            activation, bool(module.has_gate),
        )  # fmt: skip
        return found


def _activation(module: Any) -> str | None:
    """The activation of experts that the operator computes; None for any other."""
    from transformers.integrations.moe import _default_apply_gate

    own_gate = getattr(type(module), "_apply_gate", None)
    plain = (
        getattr(module, "is_concatenated", False)
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
        and (own_gate is _default_apply_gate or not module.has_gate)
    )
    return activation_name(getattr(module, "act_fn", None)) if plain else None


@contextlib.contextmanager
def grouped_experts(model: torch.nn.Module) -> Iterator[None]:
    """The model's experts are computed by our operator meanwhile."""
    moe = sys.modules.get("transformers.integrations.moe")  # else it has no such module
    if moe is None:
        yield
        return
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "_is_expert_parallel")]
    functions = moe.ALL_EXPERTS_FUNCTIONS
    configs = {id(m.config): m.config for m in modules}.values()
    own = [config._experts_implementation_internal for config in configs]
    functions[NAME] = _Experts({id(m): _activation(m) for m in modules})
    try:
        for config in configs:
            config._experts_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, own, strict=True):
            config._experts_implementation_internal = name
        del functions[NAME]
