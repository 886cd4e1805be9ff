"""What was decided, on the nodes themselves, where a viewer such as Netron shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsify.codegen.emit.onnx.names import SITE
from sparsify.codegen.emit.onnx.weights import StoredWeight
from sparsify.ops.onnx import DOMAIN
from sparsify.report import Decision, Report

if TYPE_CHECKING:
    from onnxscript import ir

_KEY = f"{DOMAIN}.{{}}"


def describe(
    sites: Mapping[ir.Node, str],
    stored: Mapping[ir.Node, Mapping[str, StoredWeight]],
    report: Report,
) -> None:
    """Sets ``metadata_props`` of our nodes: site, storage of the weight, the last decision."""
    decisions = {decision.site: decision for decision in (*report, *report.final())}
    for node, site in sites.items():
        facts: dict[str, str] = {}
        if node in stored:
            facts |= _storage(list(stored[node].values()))
        if site in decisions:
            facts |= _decision(decisions[site], report.target)
        node.metadata_props[SITE] = site
        node.metadata_props.update({_KEY.format(key): text for key, text in facts.items() if text})


def _storage(weights: Sequence[StoredWeight]) -> dict[str, str]:
    """Of all weights of a node, which are in one form."""
    nnz = sum(weight.nnz for weight in weights)
    dense = sum(weight.dense_nbytes for weight in weights)
    types = " and ".join(dict.fromkeys(weight.value_type for weight in weights))
    return {
        "storage": f"{weights[0].storage} of {types}",
        "nnz": str(nnz),
        "density": f"{4 * nnz / max(1, dense):.4f}",
        "bytes": str(sum(weight.nbytes for weight in weights)),
        "dense_bytes": str(dense),
    }


def _decision(decision: Decision, target: str) -> dict[str, str]:
    return {
        "verdict": decision.verdict,
        "reason": decision.reason,
        "decided_by": decision.made_by,
        "layout": decision.layout or "",
        "target": target if decision.layout else "",
    }
