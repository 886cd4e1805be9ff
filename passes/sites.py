"""Names: of sites, of their packed weights, and of weights that were merged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx

from sparsify.layouts import Layout, Stack, parse
from sparsify.ops import ExpertsShape
from sparsify.passes.graph import arguments
from sparsify.program import Program, Site
from sparsify.rewriter import Rewriter


def site_name(weight: str) -> str:
    """``encoder.layer.0.output.dense.weight`` -> ``encoder.layer.0.output.dense``."""
    return weight.removesuffix(".weight")


def packed_name(weight: str, layout: Layout, tensor: str) -> str:
    """The store's name for one tensor of a packed weight: ``w:sell{rows=8,...}.values``.

    The colon keeps it apart from modules; the whole spec keeps two packings of a weight apart.
    """
    return f"{weight}:{layout.spec}.{tensor}"


def pack(weight: torch.Tensor, name: str, layout: Layout) -> dict[str, torch.Tensor]:
    """The packed tensors of a weight under their names in the store, in the layout's order."""
    packed = layout.pack(weight.detach())
    return {packed_name(name, layout, tensor): packed[tensor] for tensor in layout.tensors}


def stored_weight(program: Program | Rewriter, node: fx.Node) -> torch.Tensor:
    """The dense weight of one of `ops.LINEARS`, from whatever layout it has."""
    options = arguments(node)
    layout = parse(options["layout"])
    tensors = [named_weight(program, operand)[1] for operand in options["weight"]]
    packed = dict(zip(layout.tensors, tensors, strict=True))
    return layout.unpack(packed, (options["out_features"], options["in_features"]))


def linear_site(program: Program | Rewriter, node: fx.Node) -> Site:
    """The site of one of `ops.LINEARS`."""
    options = arguments(node)
    layout = parse(options["layout"])
    name, _ = named_weight(program, options["weight"][0])
    weight = name.removesuffix(packed_name("", layout, layout.tensors[0]))
    entry = program.name if isinstance(program, Program) else ""
    return Site(entry, node.name, weight, (options["out_features"], options["in_features"]))


def expert_stacks(program: Program | Rewriter, node: fx.Node) -> list[tuple[Stack, str]]:
    """The weights of a ``sparsify::experts`` node, up's and down's, with their plain names."""
    options = arguments(node)
    names = ("count", "out_features", "hidden", "in_features", "gated")
    shape = ExpertsShape(*(options[name] for name in names))
    up, down = shape.up(parse(options["up_layout"])), shape.down(parse(options["down_layout"]))
    found = []
    for stack, operands in ((up, options["up"]), (down, options["down"])):
        name, _ = named_weight(program, operands[0])
        suffix = packed_name("", stack.layout, stack.layout.tensors[0])
        found.append((stack, name.removesuffix(suffix)))
    return found


def named_weight(program: Program | Rewriter, node: fx.Node) -> tuple[str, torch.Tensor]:
    """The name and the tensor of an operand that must be a weight."""
    name = (
        program.weight_names.get(node.name)
        if isinstance(program, Program)
        else program.weight_name(node)
    )
    tensor = program.weight_of(node)
    if name is None or tensor is None:
        raise ValueError(f"operand {node.name} ({node.op}) is no weight of the program")
    return name, tensor.detach()


def merged_name(names: Sequence[str]) -> str:
    """One name for several: ``self.query.weight, self.key.weight -> self.{query,key}.weight``."""
    parts = [name.split(".") for name in names]
    reversed_parts = [list(reversed(p)) for p in parts]
    head = len(common_head(parts))
    shortest = min(map(len, parts))
    tail = min(len(common_head(reversed_parts)), shortest - head)
    middles = [".".join(p[head : len(p) - tail]) for p in parts]
    joined = "{" + ",".join(middles) + "}"
    return ".".join([*parts[0][:head], joined, *parts[0][len(parts[0]) - tail :]])


def common_head(paths: Sequence[Sequence[str]]) -> list[str]:
    """The parts with which all of the paths begin."""
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in shared]


def member_names(name: str) -> tuple[str, ...]:
    """The names that `merged_name` joined, or the name alone."""
    head, brace, rest = name.partition("{")
    if not brace:
        return (name,)
    middles, _, tail = rest.partition("}")
    names = (head + middle + tail for middle in middles.split(","))
    return tuple(name.replace("..", ".").strip(".") for name in names)


def left_out(
    site: str, sites: Iterable[str], skip: Iterable[str] = (), disabled: Iterable[str] = ()
) -> str | None:
    """Why a recipe leaves a site as it is, None where it does not.

    Args:
        sites, skip: shell patterns of the sites that the recipe is for, and of those it is not for.
        disabled: of those that the caller has switched off.
    """
    if is_disabled(site, disabled):
        return "switched off by the caller"
    if not is_disabled(site, sites):
        return f"the recipe is for {', '.join(sites)}"
    if is_disabled(site, skip):
        return f"the recipe skips {', '.join(skip)}"
    return None


def as_patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """Shell patterns, of which one may stand alone."""
    return (given,) if isinstance(given, str) else tuple(given)


def is_disabled(site: str, patterns: Iterable[str]) -> bool:
    """Whether a shell pattern names the site or one that was merged into it."""
    names = (site, *member_names(site))
    return any(name == p or fnmatchcase(name, p) for p in patterns for name in names)
