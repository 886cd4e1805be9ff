"""Decode reads the latest pages and the first."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.passes.select_pages import PageSelection
from sparsify.selectors import Latest


@dataclass(frozen=True)
class StreamingWindow(PageSelection):
    """A step reads the sinks and the latest tokens, ``budget`` of them together.

    Before::

        y = paged_attention(q, keys, values, pages, lengths, counts)

    After::

        selected = select_pages(q, keys, [], pages, lengths, counts, "latest", budget)
        y = paged_attention(q, keys, values, pages, lengths, counts, selected=selected)

    Unlike a sliding window of the model's own, the cache keeps all, and positions stay as they are.
    `PageSelection` has the attributes.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
    """

    name = "streaming_window"
    selector = Latest()
