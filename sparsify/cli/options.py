"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt2 or .onnx file, a Hugging Face folder, or module:factory (a callable that "
        "returns a model, or a model and its example inputs).",
        show_default=False,
    ),
]
Target = Annotated[str, typer.Option(help="What to compile for; see 'sparsify targets'.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of one call.", show_default="one for each physical core"),
]
Tune = Annotated[
    str,
    typer.Option(help="Choose layouts by measuring: 'off', 'quick' (the best few) or 'full'."),
]
Cache = Annotated[bool, typer.Option(help="Reuse an earlier compilation.")]
Batch = Annotated[int | None, typer.Option(help="Batch size of the inputs.", show_default="1")]
Seq = Annotated[int | None, typer.Option(help="Tokens in a sequence.", show_default="128")]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SIZES",
        help="Shape of an input of an ONNX file, as 'x=1,3,224,224' or, with dynamic sizes, "
        "'x=batch,3,?,?'; may be repeated.",
    ),
]
Constant = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Value of an input of an ONNX file that then is none any more; may be repeated.",
    ),
]
Standard = Annotated[
    bool, typer.Option("--standard", help="In ONNX: standard operators only, and dense weights.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
