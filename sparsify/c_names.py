"""Names that C, C++ and Python can all have, for what is exported."""

from __future__ import annotations

import re

_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
    char32_t class co_await co_return co_yield compl concept const const_cast consteval
    constexpr constinit continue decltype default delete do double dynamic_cast else enum
    explicit export extern false float for friend goto if inline int long mutable namespace new
    noexcept not not_eq nullptr operator or or_eq private protected public register
    reinterpret_cast requires restrict return short signed sizeof static static_assert
    static_cast struct switch template this thread_local throw true try typedef typeid typename
    typeof union unsigned using virtual void volatile wchar_t while xor xor_eq
    """,
    )
)
"""Of C23 and C++20."""

_FILES = frozenset(
    re.findall(
        r"\w+",
        """
    assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal
    stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string tgmath
    threads time uchar wchar wctype checks launch main npy pool serial sparsify wait ctypes numpy
    pathlib sys
    """,
    )
)
"""Headers of C, files beside the exported ones, and modules that the Python wrapper imports."""


def c_name(text: str) -> str:
    """A name of a tensor as an identifier, in lower case: ``Next.h`` -> ``next_h``."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII).lower()
    return f"_{name}" if re.match(r"\d", name) else name


def member_name(name: str) -> str:
    """The member of a struct for a tensor's name: ``new`` -> ``new_``."""
    return f"{name}_" if name in _WORDS else name


def check_model_name(name: str) -> None:
    """Refuses a name that the files of a model cannot have.

    Raises:
        ValueError: it is no identifier, a word of C or C++, or the name of another file.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"export_c: name {name!r} must be a C identifier in lower case")
    if name in _WORDS or name in _FILES:
        raise ValueError(
            f"export_c: name {name!r} is a word of C or C++, or that of another header or file; "
            f"take another, {name + '_model'!r} for example"
        )
