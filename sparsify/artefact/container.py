"""The file of a compiled model: an uncompressed zip of named parts under a manifest.

Every part but the manifest has its size and SHA-256 digest in the manifest. Parts start at
multiples of 64 bytes, so that other tools can map tensors in place.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT = "sparsify compiled model"
FORMAT_VERSION = 2
_MANIFEST = "manifest.json"
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20
_PADDING_ID = 0xD935
"""Extra field that pads a zip entry, as Android's zipalign writes it."""

Chunks = Iterable[bytes | memoryview]


class ArtefactError(ValueError):
    """A file of a compiled model cannot be written or read; says which, why, and what to do."""


def check_fields(record: Any, kinds: Mapping[str, Any], what: str) -> None:
    """Checks what was read from a manifest.

    Args:
        kinds: type, or union of types, of each field that there must be.
        what: the record, for the message.

    Raises:
        ArtefactError: naming the field that is missing or of another type.
    """
    if not isinstance(record, dict):
        raise ArtefactError(f"{what} is {record!r}, no record of fields")
    for name, kind in kinds.items():
        if name not in record:
            raise ArtefactError(f"{what} has no field {name!r}")
        if not isinstance(record[name], kind):
            raise ArtefactError(f"the field {name!r} of {what} is {record[name]!r}")


def write(
    path: str | os.PathLike[str],
    parts: Mapping[str, Chunks],
    about: Callable[[dict[str, str]], Any],
) -> None:
    """Writes the parts, and a manifest with ``about(digests of the parts)``.

    The file is complete or untouched.

    Raises:
        FileNotFoundError, PermissionError, OSError: the place cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot save to {path}: it is a directory; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot save to {path}: there is no directory {path.parent}; create it first"
        )
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as cause:
        raise type(cause)(
            f"cannot save to {path}: the directory {path.parent} is not writable "
            f"({cause.strerror}); choose another place"
        ) from cause
    try:
        with os.fdopen(descriptor, "wb") as file:
            _write_archive(file, parts, about)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except OSError as cause:
        raise type(cause)(f"cannot save to {path}: {cause.strerror or cause}") from cause
    finally:
        Path(partial).unlink(missing_ok=True)


def _write_archive(
    file: Any, parts: Mapping[str, Chunks], about: Callable[[dict[str, str]], Any]
) -> None:
    records: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, chunks in parts.items():
            digest, size = hashlib.sha256(), 0
            with archive.open(_entry(name, file.tell()), "w", force_zip64=True) as out:
                for chunk in chunks:
                    out.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            records[name] = {"bytes": size, "sha256": digest.hexdigest()}
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "parts": records,
            "about": about({name: record["sha256"] for name, record in records.items()}),
        }
        text = json.dumps(manifest, indent=1)
        archive.writestr(zipfile.ZipInfo(_MANIFEST), text)


def _entry(name: str, offset: int) -> zipfile.ZipInfo:
    """A zip entry whose data will start at a multiple of the alignment."""
    entry = zipfile.ZipInfo(name)
    start = offset + _LOCAL_HEADER + len(name.encode()) + _ZIP64_EXTRA + 4
    padding = -start % _ALIGNMENT
    entry.extra = _PADDING_ID.to_bytes(2, "little") + padding.to_bytes(2, "little")
    entry.extra += bytes(padding)
    return entry


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class Container:
    """An opened file: its manifest, and its parts once their digests are checked.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError: no file of ours, another format version, truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"cannot load {self.path}: there is no such file")
        if not self.path.is_file() or self.path.stat().st_size == 0:
            raise ArtefactError(f"cannot load {self.path}: it is empty or not a file")
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with zipfile.ZipFile(file) as archive:
                    self._entries = {entry.filename: entry for entry in archive.infolist()}
                    text = archive.read(_MANIFEST)
        except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as cause:
            raise ArtefactError(self._foreign(cause)) from cause
        self._manifest = self._checked_manifest(text)
        try:
            check_fields(self._manifest, {"about": dict, "parts": dict}, "its manifest")
            for name, part in self._manifest["parts"].items():
                check_fields(part, {"bytes": int, "sha256": str}, f"the manifest's part {name!r}")
        except ArtefactError as cause:
            raise ArtefactError(f"cannot load {self.path}: {cause}") from cause

    @property
    def about(self) -> Any:
        return self._manifest["about"]

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by part, as the manifest gives them."""
        return {name: record["sha256"] for name, record in self._manifest["parts"].items()}

    def part(self, name: str) -> memoryview:
        """The bytes of a part, compared with its digest."""
        record, entry = self._manifest["parts"].get(name), self._entries.get(name)
        if record is None or entry is None:
            raise ArtefactError(f"cannot load {self.path}: the part {name!r} is missing")
        offset = entry.header_offset
        header = self._map[offset : offset + _LOCAL_HEADER]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = offset + _LOCAL_HEADER + lengths
        data = memoryview(self._map)[start : start + record["bytes"]]
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise ArtefactError(
                f"cannot load {self.path}: the part {name!r} is damaged (its SHA-256 digest "
                "differs from the manifest's); copy or save the file again"
            )
        return data

    def _checked_manifest(self, text: bytes) -> dict[str, Any]:
        try:
            manifest = json.loads(text)
            ours = manifest["format"] == FORMAT
            version = int(manifest["format_version"])
        except (ValueError, KeyError, TypeError) as cause:
            raise ArtefactError(self._foreign(cause)) from cause
        if not ours:
            raise ArtefactError(self._foreign(f"its format is {manifest['format']!r}"))
        if version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            remedy = "install a newer sparsify, or save" if newer else "compile and save"
            raise ArtefactError(
                f"cannot load {self.path}: it has format version {version}, this sparsify reads "
                f"{FORMAT_VERSION}; {remedy} the model again"
            )
        return dict(manifest)

    def _foreign(self, cause: object) -> str:
        with self.path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            return (
                f"cannot load {self.path}: it is truncated, or no file of sparsify ({cause}); "
                "copy it again, or write one with CompiledModel.save"
            )
        return (
            f"cannot load {self.path}: it is no file of sparsify; write one with CompiledModel.save"
        )
