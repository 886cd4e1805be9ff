"""What a saved model's layouts were measured to be, so that they hold when it is built again."""

from __future__ import annotations

from sparsify import ops
from sparsify.contracts import MeasuredChoice
from sparsify.layouts import LANES, Form, form_of
from sparsify.passes.graph import arguments
from sparsify.passes.sites import linear_site
from sparsify.program import ProgramSet
from sparsify.report import Report


def is_tuned(report: Report) -> bool:
    """Whether any layout was chosen by measuring."""
    return any(decision.measured_seconds is not None for decision in report)


def measured_choices(specialised: ProgramSet, report: Report) -> dict[str, MeasuredChoice]:
    """By site, the layouts that a report calls measured."""
    seconds = {d.site: d.measured_seconds for d in report if d.measured_seconds is not None}
    layouts: dict[str, dict[Form, str]] = {}
    for program in specialised:
        for node in program.graph.nodes:
            if node.target not in ops.LINEARS:
                continue
            site, options = linear_site(program, node).name, arguments(node)
            in_lanes = options.get("lanes", False)
            tokens = LANES if in_lanes else ops.expected_tokens(options["x"].meta["val"])
            layouts.setdefault(site, {})[form_of(tokens)] = options["layout"]
    return {
        site: MeasuredChoice(layouts[site], found)
        for site, found in seconds.items()
        if site in layouts
    }
