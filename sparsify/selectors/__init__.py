"""Which pages of the cache a query reads: one file a method, each with its plain reference."""

from sparsify.selectors.base import PageSelector, Scoring, parse, register, selector_names
from sparsify.selectors.channels import Channels
from sparsify.selectors.exact import Exact
from sparsify.selectors.latest import Latest
from sparsify.selectors.page_bounds import PageBounds

__all__ = [
    "Channels",
    "Exact",
    "Latest",
    "PageBounds",
    "PageSelector",
    "Scoring",
    "parse",
    "register",
    "selector_names",
]
