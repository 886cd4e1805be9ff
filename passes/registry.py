"""Passes by name: the default pipelines, and pipelines written as text.

The text form is xDSL's: ``fuse_attention,sparse_linear{max_density=0.7},select_layout``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.contracts import Pass
from sparsify.passes.analyze_weights import AnalyzeWeights
from sparsify.passes.canonicalize import Canonicalize
from sparsify.passes.fold_constants import FoldConstants
from sparsify.passes.fuse_attention import FuseAttention
from sparsify.passes.fuse_epilogue import FuseEpilogue
from sparsify.passes.fuse_gate import FuseGate
from sparsify.passes.fuse_norm import FuseNorm
from sparsify.passes.fuse_rotary import FuseRotary
from sparsify.passes.lower_moe import LowerMoe
from sparsify.passes.merge_projections import MergeProjections
from sparsify.passes.partition import Partition
from sparsify.passes.propagate_lanes import PropagateLanes
from sparsify.passes.recompose import Recompose
from sparsify.passes.select_experts import SelectExperts
from sparsify.passes.select_layout import SelectLayout
from sparsify.passes.simplify_masks import SimplifyMasks
from sparsify.passes.simplify_views import SimplifyViews
from sparsify.passes.sparse_linear import SparseLinear

PORTABLE: tuple[Pass, ...] = (
    LowerMoe(),
    Canonicalize(),
    SimplifyMasks(),
    FoldConstants(),
    Recompose(),
    FuseNorm(),
    FuseRotary(),
    FuseAttention(),
    SimplifyViews(),
    MergeProjections(),
    FuseGate(),
    SparseLinear(),
    FuseEpilogue(),
)
"""What every compilation runs: the result knows no target."""

SPECIALISE: tuple[Pass, ...] = (SelectLayout(), SelectExperts(), PropagateLanes(), Partition())
"""What binds a portable program to one target; needs ``PassContext.cost``."""

_KNOWN: dict[str, type] = {
    pass_.name: type(pass_) for pass_ in (AnalyzeWeights(), *PORTABLE, *SPECIALISE)
}
_ITEM = re.compile(r"^(?P<name>\w+)(?:\{(?P<options>.*)\})?$", re.DOTALL)
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class PassInfo:
    """One line of the list of passes.

    Attributes:
        summary: what it does, the first line of its docstring.
        options: default value by option name.
        stage: ``portable``, ``specialise``, or ``on request`` when no default pipeline has it.
    """

    name: str
    summary: str
    options: dict[str, Any]
    stage: str


def pass_names() -> tuple[str, ...]:
    return tuple(_KNOWN)


def describe() -> tuple[PassInfo, ...]:
    """Every pass that can be named, in pipeline order."""
    stages = {p.name: "portable" for p in PORTABLE}
    stages |= {p.name: "specialise" for p in SPECIALISE}
    return tuple(
        PassInfo(
            name,
            (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "),
            {f.name: f.default for f in dataclasses.fields(kind)},
            stages.get(name, "on request"),
        )
        for name, kind in _KNOWN.items()
    )


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes that a text names, with their options.

    Raises:
        ValueError: for an unknown pass or option, or a value of the wrong type.
    """
    return tuple(map(_parse_pass, _split(text)))


def pipeline_text(passes: Iterable[Pass]) -> str:
    """The inverse of `parse_pipeline`; options at their default are left out."""
    return ",".join(map(_text, passes))


def without(passes: Sequence[Pass], names: Iterable[str]) -> tuple[Pass, ...]:
    """A pipeline with some passes switched off.

    Raises:
        ValueError: for a name that no pass has.
    """
    off = set(names)
    for name in off:
        _find(name)
    return tuple(pass_ for pass_ in passes if pass_.name not in off)


def _text(pass_: Pass) -> str:
    options = [
        f"{f.name}={_value_text(getattr(pass_, f.name))}"
        for f in dataclasses.fields(pass_)  # type: ignore[arg-type]
        if getattr(pass_, f.name) != f.default
    ]
    return f"{pass_.name}{{{','.join(options)}}}" if options else pass_.name


def _value_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _find(name: str) -> type:
    if name not in _KNOWN:
        raise ValueError(f"unknown pass {name!r}; known passes: {', '.join(_KNOWN)}")
    return _KNOWN[name]


def _parse_pass(item: str) -> Pass:
    match = _ITEM.match(item)
    if match is None:
        raise ValueError(f"cannot read {item!r}; a pass is written name or name{{option=value}}")
    kind = _find(match["name"])
    types = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    options = {}
    for assignment in _split(match["options"] or ""):
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"pass {match['name']!r} has no option {key!r}; {has}")
        if not equals:
            raise ValueError(f"pass {match['name']!r}: write {key}=VALUE")
        options[key] = _value(match["name"], key, value, types[key])
    return typing.cast(Pass, kind(**options))


def _value(name: str, key: str, text: str, kind: Any) -> Any:
    try:
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise ValueError(f"pass {name!r}: {key}={text!r} is not {expected}") from None


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside braces."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            raise ValueError(f"a brace closes that was not opened in {text!r}")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if depth:
        raise ValueError(f"a brace stays open in {text!r}")
    parts.append(current.strip())
    return [part for part in parts if part]
