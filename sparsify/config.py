"""What a compilation is asked for, checked before any work begins."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

from sparsify.sources import plugin_digest

VerifyLevel = Literal["shapes", "numeric"]
"""How each pass is checked: by graph lint and shapes, or also by running both programs."""

TuneLevel = Literal["off", "quick", "full"]
"""How layouts are chosen: by prediction, or by timing the best few, or all, of the candidates."""


class ModelRecipe(Protocol):
    """A change of a model's numbers, which so must be asked for: a pruning method.

    Like all recipes it is a frozen dataclass; its fields are part of the cache key.
    """

    def apply(self, model: Any) -> Any:
        """Applies the recipe to the model in place; returns an account of what it did."""
        ...


class ProgramRecipe(Protocol):
    """A change of numbers by rewriting the graph: gating, sparse attention.

    It is a pass that runs on the portable program, after the passes that everything goes through.
    """

    name: ClassVar[str]

    def run(self, programs: Any, context: Any) -> Any:
        """See `sparsify.contracts.Pass.run`."""
        ...


Recipe = ModelRecipe | ProgramRecipe


@dataclass(frozen=True)
class CompileConfig:
    """The options of ``sparsify.compile``.

    Attributes:
        target: name of a target; ``native`` is the CPU this runs on.
        num_threads: threads of one call, None for one for each physical core.
        dynamic_shapes: ``"auto"``, None for the shapes of the examples, or what
            ``torch.export.export`` takes.
        recipe: one recipe or several in order: pruning, such as ``Unstructured(0.8)``, of a copy
            of the model, and rewrites of its program.
        strict: refuse, naming the site, instead of leaving an operator to PyTorch or a site of
            the recipe dense.
        passes: the pipeline, as text or as passes in order; None for the standard one.
        disable: names of passes to leave out.
        verify: see `VerifyLevel`.
        tune: see `TuneLevel`.
        cache: reuse an earlier compilation of the same model.
        observer: called as the pipeline runs; no part of the digest.

    Raises:
        TypeError, ValueError: naming the option, what it was and what it may be.
    """

    target: str = "native"
    num_threads: int | None = None
    dynamic_shapes: Any = "auto"
    recipe: Recipe | tuple[Recipe, ...] | None = None
    strict: bool = False
    passes: str | tuple[Any, ...] | None = None
    disable: tuple[str, ...] = ()
    verify: VerifyLevel = "shapes"
    tune: TuneLevel = "off"
    cache: bool = True
    observer: Callable[..., Any] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not self.target:
            raise TypeError(f"target={self.target!r} must be a name, such as 'native'")
        count = self.num_threads
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise TypeError(f"num_threads={count!r} must be a whole number or None")
        if count is not None and count < 1:
            raise ValueError(f"num_threads={count} must be at least 1")
        if isinstance(self.dynamic_shapes, str) and self.dynamic_shapes != "auto":
            raise ValueError(
                f"dynamic_shapes={self.dynamic_shapes!r} is unknown; use 'auto', None, or a "
                "torch.export dynamic_shapes specification"
            )
        self._check_recipe()
        for name in ("strict", "cache"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        for name, levels in (("verify", VerifyLevel), ("tune", TuneLevel)):
            if getattr(self, name) not in get_args(levels):
                known = " or ".join(map(repr, get_args(levels)))
                raise ValueError(f"{name}={getattr(self, name)!r} must be {known}")
        if self.observer is not None and not callable(self.observer):
            raise TypeError(f"observer={self.observer!r} must be callable")
        object.__setattr__(self, "disable", _names("disable", self.disable))
        if self.passes is not None and not isinstance(self.passes, str):
            object.__setattr__(self, "passes", _items("passes", self.passes))

    @property
    def model_recipes(self) -> tuple[ModelRecipe, ...]:
        """Those that change the model before it is captured."""
        return tuple(r for r in self._recipes if hasattr(r, "apply"))

    @property
    def program_recipes(self) -> tuple[Any, ...]:
        """Those that are passes over the portable program."""
        return tuple(r for r in self._recipes if not hasattr(r, "apply"))

    @property
    def _recipes(self) -> tuple[Any, ...]:
        if self.recipe is None:
            return ()
        return self.recipe if isinstance(self.recipe, tuple) else (self.recipe,)

    def _check_recipe(self) -> None:
        if isinstance(self.recipe, list):
            object.__setattr__(self, "recipe", tuple(self.recipe))
        for recipe in self._recipes:
            works = callable(getattr(recipe, "apply", None)) or callable(
                getattr(recipe, "run", None)
            )
            if isinstance(recipe, type) or not works:
                raise TypeError(
                    f"recipe={recipe!r} is no recipe; pass one such as "
                    "sparsify.pruning.Unstructured(0.8)"
                )
            if not dataclasses.is_dataclass(recipe):
                raise TypeError(
                    f"recipe={recipe!r} must be a dataclass, so that it can be compared"
                )

    def digest(self) -> str:
        """SHA-256 over every option that can change the result; equal in every process."""
        parts = {
            field.name: _canonical(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("cache", "observer", "verify")
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r} must be a sequence")
    return tuple(value)


def _names(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else _items(name, value)
    wrong = [item for item in items if not isinstance(item, str)]
    if wrong:
        raise TypeError(f"{name}={value!r} must hold names; {wrong[0]!r} is none")
    return items


def _canonical(value: Any) -> Any:
    """Plain lists and text with a fixed order, free of memory addresses."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return [[str(key), _canonical(item)] for key, item in sorted(value.items(), key=_key_text)]
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return [name, _canonical(fields), *filter(None, [plugin_digest(kind)])]
    if callable(getattr(value, "digest", None)):
        return value.digest()
    bounds = [getattr(value, bound, None) for bound in ("min", "max")]  # torch.export.Dim
    return [getattr(value, "__name__", str(value)), *map(_canonical, bounds)]


def _key_text(item: tuple[Any, Any]) -> str:
    return str(item[0])
