"""How commands speak: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer
from rich.console import Console

Function = TypeVar("Function", bound=Callable[..., None])

_PIPE_WIDTH = 240
"""Columns of a table that goes to a file or a pipe, which has no width of its own."""

_LONGEST = 600
"""Characters of an error; PyTorch's can fill pages."""

_state = {"debug": False}


def set_debug(debug: bool) -> None:
    """Whether errors show their traceback."""
    _state["debug"] = debug


def show(*items: Any) -> None:
    """Prints tables and text to stdout; rich honours NO_COLOR and COLUMNS."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    Console(width=_PIPE_WIDTH if piped else None, highlight=False).print(*items)


def show_json(record: Any) -> None:
    """Prints one JSON document with sorted keys."""
    print(json.dumps(record, indent=2, sort_keys=True))


def note(text: str) -> None:
    """Prints one line to stderr."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Shows what is going on while it lasts; only on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def command(function: Function) -> Function:
    """Turns every error into a message on stderr and exit code 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except BrokenPipeError:  # the reader of stdout, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if _state["debug"]:
                raise
            note(f"error: {_message(error)}")
            raise typer.Exit(2) from None

    return run  # type: ignore[return-value]


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _is_ours(error):
        return str(error)  # whole: it may list what all is wrong
    text = " ".join(str(error).split())
    known = isinstance(error, ValueError | TypeError | RuntimeError | OSError) and text
    if known and len(text) <= _LONGEST:
        return text
    # Something that no check of ours foresaw: its type and its traceback help.
    where = "(run 'sparsify --debug ...' for the traceback)"
    return f"{type(error).__name__}: {text[:_LONGEST]} {where}"


def _is_ours(error: Exception) -> bool:
    """Whether a check of this package raised it."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = "" if frame is None else frame.tb_frame.f_globals.get("__name__", "")
    known = isinstance(error, ValueError | TypeError | RuntimeError | OSError)
    return known and bool(str(error)) and raised_in.partition(".")[0] == "sparsify"
