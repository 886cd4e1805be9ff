"""How sparsify's operators are declared: one torch library, schema, eager reference, fake kernel.

``Library.define``/``impl`` costs 2-3 us a call, ``torch.library.custom_op`` 8-11: we use the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_LIBRARY = torch.library.Library("sparsify", "DEF")


@dataclass(frozen=True)
class Operator:
    """One operator family: what every exporter and back end needs to know about it."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.sparsify, self.name).default


OPERATORS: dict[str, Operator] = {}


def declare(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates an eager reference, written with stock PyTorch, into an `Operator`.

    Names must be unique without their namespace: TVM's importer looks converters up by bare name.
    """

    def wrap(reference: Callable[..., Any]) -> Operator:
        name = schema.split("(", 1)[0]
        operator = Operator(name, schema, reference, fake)
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparsify::{name}", fake, lib=_LIBRARY)
        OPERATORS[name] = operator
        return operator

    return wrap
