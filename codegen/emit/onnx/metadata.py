"""What was decided, on the nodes themselves, where a viewer such as Netron shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.codegen.emit.onnx.names import SITE
from sparsify.codegen.emit.onnx.weights import StoredWeight
from sparsify.ops.onnx import DOMAIN
from sparsify.report import Decision, Report

if TYPE_CHECKING:
    from onnxscript import ir

_KEY = f"{DOMAIN}.{{}}"


def describe(
    sites: Mapping[ir.Node, str], stored: Mapping[ir.Node, StoredWeight], report: Report
) -> None:
    """Sets ``metadata_props`` of our nodes: site, storage of the weight, the last decision."""
    decisions = {decision.site: decision for decision in (*report, *report.final())}
    for node, site in sites.items():
        facts: dict[str, str] = {}
        if node in stored:
            facts |= _storage(stored[node])
        if site in decisions:
            facts |= _decision(decisions[site], report.target)
        node.metadata_props[SITE] = site
        node.metadata_props.update({_KEY.format(key): text for key, text in facts.items() if text})


def _storage(weight: StoredWeight) -> dict[str, str]:
    return {
        "storage": f"{weight.storage} of {weight.value_type}",
        "nnz": str(weight.nnz),
        "density": f"{weight.density:.4f}",
        "bytes": str(weight.nbytes),
        "dense_bytes": str(weight.dense_nbytes),
    }


def _decision(decision: Decision, target: str) -> dict[str, str]:
    return {
        "verdict": decision.verdict,
        "reason": decision.reason,
        "decided_by": decision.made_by,
        "layout": decision.layout or "",
        "target": target if decision.layout else "",
    }
