"""How ONNX operators become PyTorch's: handlers, registered by domain, name and since-version.

A handler is a function of a `Node` and the node's inputs in ONNX's order:

    @operator("LeakyRelu")
    def leaky_relu(node: Node, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x, node.get("alpha", 0.01))

    @operator("Reshape", host=("shape",))
    def reshape(node: Node, x: torch.Tensor, shape: np.ndarray) -> torch.Tensor: ...

    @operator("MatMul", constants=("b",))
    def matmul(node: Node, a: torch.Tensor, b: torch.Tensor | Constant) -> torch.Tensor: ...

It is traced, so it must not branch on the elements of tensors. Sizes may be ``torch.SymInt``. When
all inputs are constants it is run on real tensors at once, and its results are constants; so no
handler folds constants itself. Left-out optional inputs are None; give them a default. Results are
a tensor, sizes (a NumPy array of dtype object, see `values`), or a tuple of those, one for each
output of the node; trailing outputs that nobody asked for may be left out.

A form that a handler does not serve is refused by ``raise Unsupported("why, in a few words")``;
the import goes on, so that one error lists all refusals of a model.
``NeedsSizes`` refuses dynamic sizes; the error then says how to fix them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

STANDARD = ""
"""The domain of the operators of ONNX itself, also written ``ai.onnx``."""

MICROSOFT = "com.microsoft"
"""The domain of the operators that ONNX Runtime adds."""


def standard(domain: str) -> str:
    """One name for the domain of ONNX, which files write in two ways."""
    return STANDARD if domain == "ai.onnx" else domain


class Unsupported(Exception):
    """This form of an operator has no handler; says why in a few words."""


class NeedsSizes(Unsupported):
    """It has one for static sizes alone; says which sizes are dynamic."""


@dataclass(frozen=True)
class Handler:
    """A function that computes an operator from version ``since`` of its domain on.

    Attributes:
        run: takes the node and its inputs.
        host: names of the parameters that must be known while tracing, given as NumPy arrays (of
            dtype object where a size is symbolic).
        constants: names of the parameters that are given as `Constant` where they are one, for
            handlers that store them otherwise or read their elements.
        on_sizes: computes the operator on NumPy arrays alone, for sizes; None where no exporter
            calculates sizes with it. Elements may be ``torch.SymInt``, except in ``host``
            parameters; NotImplemented says that the result must be a tensor.
    """

    domain: str
    operator: str
    since: int
    run: Callable[..., Any]
    host: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    on_sizes: Callable[..., Any] | None = None

    def parameters(self, count: int) -> list[str]:
        """The parameter that takes each of ``count`` inputs.

        Raises:
            Unsupported: the handler takes fewer.
        """
        names: list[str] = []
        for parameter in list(inspect.signature(self.run).parameters.values())[1:]:
            if parameter.kind == parameter.VAR_POSITIONAL:
                names += [parameter.name] * (count - len(names))
            elif parameter.kind != parameter.KEYWORD_ONLY:
                names.append(parameter.name)
        if len(names) < count:
            raise Unsupported(f"has {count} inputs, {len(names)} are served")
        return names[:count]


_HANDLERS: dict[tuple[str, str], list[Handler]] = {}


def operator(
    *names: str,
    domain: str = STANDARD,
    since: int = 1,
    host: Iterable[str] = (),
    constants: Iterable[str] = (),
    on_sizes: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the handler of operators, from a version of their domain on.

    It serves until the next ``since`` that is registered for the same operator; so one handler
    may serve several versions of a specification (``node.version`` tells the model's).
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            known = _HANDLERS.setdefault((domain, name), [])
            if any(handler.since == since for handler in known):
                raise ValueError(f"{domain or 'ai.onnx'}::{name} of version {since} has a handler")
            known.append(
                Handler(domain, name, since, run, frozenset(host), frozenset(constants), on_sizes)
            )
            known.sort(key=lambda handler: handler.since)
        return run

    return register


def find(domain: str, name: str, version: int) -> Handler | None:
    """The handler of an operator in version ``version`` of its domain."""
    load_handlers()
    fitting = [h for h in _HANDLERS.get((domain, name), ()) if h.since <= version]
    return fitting[-1] if fitting else None


def handlers() -> list[Handler]:
    """All of them, by domain, name and version."""
    load_handlers()
    return [handler for _, known in sorted(_HANDLERS.items()) for handler in known]


@cache
def load_handlers() -> None:
    """Imports every file of `operators`, which registers its handlers."""
    from sparsify.frontend.onnx import operators

    for module in pkgutil.iter_modules(operators.__path__):
        importlib.import_module(f"{operators.__name__}.{module.name}")
