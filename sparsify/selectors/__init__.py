"""What a query reads of its keys, pages or blocks: one file a method, each with a reference."""

from sparsify.selectors.a_shape import AShape
from sparsify.selectors.base import (
    BLOCK_SELECTORS,
    PAGE_SELECTORS,
    BlockScoring,
    BlockSelector,
    BlockView,
    PageSelector,
    Scoring,
    block_selector,
    page_selector,
    register_block_selector,
    register_page_selector,
)
from sparsify.selectors.block_gate import BlockGate
from sparsify.selectors.channels import Channels
from sparsify.selectors.exact import Exact
from sparsify.selectors.head_patterns import PATTERNS, HeadPatterns
from sparsify.selectors.latest import Latest
from sparsify.selectors.page_bounds import PageBounds
from sparsify.selectors.pooled import Pooled
from sparsify.selectors.query_aware import QueryAware
from sparsify.selectors.vertical_slash import VerticalSlash

__all__ = [
    "BLOCK_SELECTORS",
    "PAGE_SELECTORS",
    "PATTERNS",
    "AShape",
    "BlockGate",
    "BlockScoring",
    "BlockSelector",
    "BlockView",
    "Channels",
    "Exact",
    "HeadPatterns",
    "Latest",
    "PageBounds",
    "PageSelector",
    "Pooled",
    "QueryAware",
    "Scoring",
    "VerticalSlash",
    "block_selector",
    "page_selector",
    "register_block_selector",
    "register_page_selector",
]
