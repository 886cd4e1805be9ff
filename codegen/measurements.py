"""Measured times kept on disk, so that a weight is tuned once on a machine.

An entry is one small file of JSON, named by the digest of all that its times depend on. It appears
whole or not at all, and one that is damaged counts as absent, so processes may share the folder and
be killed at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sparsify.report import Notice
from sparsify.sources import sources_digest

Times = Mapping[str, Sequence[float]]
"""Layout spec -> seconds at each token count of the entry."""


class Measurements:
    """The entries in a folder; without one, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, *parts: str) -> dict[str, tuple[float, ...]] | None:
        """The times kept for these parts; None when there are none that can be used."""
        if self._folder is None:
            return None
        try:
            record = json.loads(self._path(parts).read_bytes())
            if record["digest"] != _digest(json.dumps(record["times"], sort_keys=True)):
                return None
            times = {spec: tuple(map(float, found)) for spec, found in record["times"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        usable = all(math.isfinite(t) and t > 0 for found in times.values() for t in found)
        return times if usable else None

    def keep(self, times: Times, *parts: str) -> None:
        """Stores the times of these parts; warns, saying why, where it cannot."""
        if self._folder is None:
            return
        path = self._path(parts)
        record = {spec: list(found) for spec, found in times.items()}
        text = json.dumps(
            {"digest": _digest(json.dumps(record, sort_keys=True)), "times": record, "of": parts},
            indent=1,
        )
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(text)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as cause:
            warnings.warn(f"measured times are not kept: {cause}", Notice, stacklevel=2)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds off other processes that tune: they would disturb each other's clocks.

        The operating system lets go for a process that is killed.
        """
        with contextlib.ExitStack() as stack:
            if self._folder is not None:
                with contextlib.suppress(OSError):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    lock = stack.enter_context((self._folder / "lock").open("w"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _path(self, parts: Sequence[str]) -> Path:
        assert self._folder is not None
        return self._folder / f"{_digest(*parts)}.json"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def kernel_sources() -> str:
    """The digest of the sources that a kernel's time depends on."""
    import sparsify.codegen
    import sparsify.layouts

    return sources_digest(sparsify.codegen, sparsify.layouts)
