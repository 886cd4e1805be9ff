"""``sparsify targets`` and ``sparsify passes``: what there is to choose from."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sparsify.cli import options
from sparsify.cli.console import command, show, show_json


@command
def targets(as_json: options.Json = False) -> None:
    """List the targets, and whether this machine can run their code."""
    from sparsify.codegen.target import Target, UnknownTarget, target_names

    rows: list[dict[str, Any]] = []
    for name in target_names():
        try:
            target = Target.parse(name)
        except UnknownTarget as error:  # native, on a machine that none of our targets covers
            rows.append({"name": name, "resolved": str(error), "features": [], "missing": [name]})
            continue
        rows.append(
            {
                "name": name,
                "resolved": target.name,
                "features": list(target.features),
                "missing": list(target.missing_features()),
            }
        )
    if as_json:
        show_json({"targets": rows})
        return
    table = Table(title="targets")
    for column in ("target", "stands for", "needs", "runs here"):
        table.add_column(column)
    for row in rows:
        missing = row["missing"]
        runs = "yes" if not missing else f"no: lacks {', '.join(missing)}"
        table.add_row(row["name"], row["resolved"], " ".join(row["features"]), runs)
    show(table)


@command
def passes(as_json: options.Json = False) -> None:
    """List the passes in pipeline order, with their options."""
    from sparsify.passes import describe

    found = describe()
    if as_json:
        show_json(
            {
                "passes": [
                    {
                        "name": info.name,
                        "stage": info.stage,
                        "options": dict(info.options),
                        "summary": info.summary,
                    }
                    for info in found
                ]
            }
        )
        return
    table = Table(title="passes")
    for column in ("pass", "stage", "options", "what it does"):
        table.add_column(column)
    for info in found:
        chosen = ", ".join(f"{key}={value!r}" for key, value in info.options.items())
        table.add_row(info.name, info.stage, chosen, info.summary)
    show(table)
