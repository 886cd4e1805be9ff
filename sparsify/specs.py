"""Specs: text that names a frozen dataclass and its parameters, and registries that read it.

``sell{rows=8,k_block=384,window=256}`` is a layout, ``top_k{k=512}`` a gate. Operators, reports and
saved files carry the text; parameters are integers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sparsify.sources import plugin_digest

_SPEC = re.compile(r"^(?P<name>\w+)(?:\{(?P<options>[^{}]*)\})?$")


class Named(Protocol):
    """A frozen dataclass with a name of its own and integer fields."""

    name: ClassVar[str]


Item = TypeVar("Item", bound=Named)


def spec_of(item: Any) -> str:
    """The text from which `Registry.parse` makes an equal item."""
    fields = dataclasses.fields(item)
    options = ",".join(f"{f.name}={getattr(item, f.name)}" for f in fields)
    return f"{item.name}{{{options}}}" if fields else str(item.name)


_REGISTRIES: list[Registry[Any]] = []


def plugins_digest() -> str:
    """SHA-256 over the code of all registered classes that are not of this package."""
    known = [item for registry in _REGISTRIES for item in registry]
    return hashlib.sha256("".join(map(plugin_digest, known)).encode()).hexdigest()


class Registry(Generic[Item]):
    """Classes of one kind by their name.

    Attributes:
        kind: what they are, for messages: ``layout``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, type[Item]] = {}
        _REGISTRIES.append(self)

    def register(self, item: type[Item]) -> type[Item]:
        """Class decorator: makes a class known by its name."""
        known = self._known.setdefault(item.name, item)
        if known is not item:
            raise ValueError(f"{self.kind} name {item.name!r} is taken by {known.__module__}")
        return item

    def __iter__(self) -> Iterator[type[Item]]:
        """The classes in the order of their names."""
        return iter([self._known[name] for name in self.names()])

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._known))

    def classes(self) -> tuple[type[Item], ...]:
        """All of them, in the order of their names."""
        return tuple(self._known[name] for name in self.names())

    def parse(self, spec: str) -> Item:
        """What a spec describes.

        Raises:
            ValueError: for an unknown name, an unknown option or a value that is no integer.
        """
        match = _SPEC.match(spec.strip())
        if match is None or match["name"] not in self._known:
            known = ", ".join(self.names())
            raise ValueError(f"unknown {self.kind} {spec!r}; known {self.kind}s: {known}")
        found = self._known[match["name"]]
        fields = dataclasses.fields(found)  # type: ignore[arg-type]
        known_options = {f.name for f in fields}
        options: dict[str, int] = {}
        for item in filter(None, (match["options"] or "").split(",")):
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in known_options:
                raise ValueError(
                    f"{self.kind} {found.name!r} has no option {key!r}; "
                    f"it has {sorted(known_options)}"
                )
            try:
                options[key] = int(value)
            except ValueError:
                raise ValueError(
                    f"{self.kind} {found.name!r}: {key}={value!r} is not an integer"
                ) from None
        missing = [
            f.name for f in fields if f.default is dataclasses.MISSING and f.name not in options
        ]
        if missing:
            raise ValueError(f"{self.kind} {spec!r}: give its option {missing[0]!r}")
        return found(**options)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Forgets, when it is left, what was registered inside."""
        before = dict(self._known)
        try:
            yield
        finally:
            self._known = before
