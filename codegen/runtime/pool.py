"""The thread pool that compiled models share, in place of TVM's own.

TVM's pool spins for about 0.13 s after each launch and makes another pool for every calling
thread. This one (`pool.c`) is one for the process, spins for microseconds, and takes the number of
threads from the thread that calls:

    pool.redirect("model.so")       # once, after TVM has loaded the library
    with pool.use_threads(2):       # or pool.set_threads(2)
        model(x)

A launch from a second thread while the pool is at work, or from inside a parallel loop, runs on
its own thread alone.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import TracebackType

from sparsify.codegen.runtime.cores import available_cores

LAUNCH_SLOT = "__TVMBackendParallelLaunch"
BARRIER_SLOT = "__TVMBackendParallelBarrier"


def set_threads(n: int) -> None:
    """Run the parallel loops that this thread launches from now on with `n` threads.

    The count includes the calling thread, so 1 starts no thread. It belongs to the calling thread
    and costs well under a microsecond to set.

    Raises:
        ValueError: `n` is below 1 or above what the pool can hold.
    """
    if n < 1 or _library().sparsify_pool_set_threads(n) < 0:
        raise _no_such_number(n)


def threads() -> int:
    """The number of threads for loops launched from this thread; at first `default_threads()`."""
    return int(_library().sparsify_pool_threads())


class use_threads:
    """`with use_threads(2):` sets the calling thread's count and restores it afterwards."""

    __slots__ = ("before", "n")

    def __init__(self, n: int) -> None:
        if n < 1:
            raise _no_such_number(n)
        self.n = n
        self.before: list[int] = []

    def __enter__(self) -> None:
        before = _library().sparsify_pool_set_threads(self.n)
        if before < 0:
            raise _no_such_number(self.n)
        self.before.append(before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _library().sparsify_pool_set_threads(self.before.pop())


@cache
def default_threads() -> int:
    """Cores that this process may use, as found on the first call (see `available_cores`)."""
    return available_cores()


def set_spin(microseconds: float) -> None:
    """How long an idle worker, or a caller waiting for one, spins before it sleeps.

    It is one setting for the process. Longer lowers the latency of short loops that follow each
    other; shorter leaves more of the core to others.

    Raises:
        ValueError: not within 0 to 1 000 000.
    """
    if not 0 <= microseconds <= 1_000_000:
        raise ValueError(f"set_spin: {microseconds} us is not within 0 to 1000000")
    _library().sparsify_pool_set_spin(round(microseconds * 1000))


def redirect(library_path: str | Path) -> None:
    """Make a library built by TVM launch its parallel loops on this pool.

    Call it after every load by TVM, which fills the slot with TVM's own launcher, a second load of
    the same file included, and before its functions run. A library without parallel loops is left
    as it is.

    Raises:
        FileNotFoundError: no such file.
        OSError: the file is not a shared library that can be loaded.
    """
    path = Path(library_path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"redirect: no library at {path}; export it first")
    ours = _library()
    _carry_errors()
    loaded = ctypes.CDLL(str(path))  # a second handle of the library that TVM holds
    for slot, function in (
        (LAUNCH_SLOT, ours.sparsify_pool_launch),
        (BARRIER_SLOT, ours.sparsify_pool_barrier),
    ):
        try:
            pointer = ctypes.c_void_p.in_dll(loaded, slot)
        except ValueError:  # the library does not use it
            continue
        pointer.value = ctypes.cast(function, ctypes.c_void_p).value


def _no_such_number(n: int) -> ValueError:
    most = _library().sparsify_pool_max_threads()
    return ValueError(f"number of threads: {n} is not within 1 to {most}")


@cache
def _carry_errors() -> None:
    """Let an error raised on a worker reach the caller's thread, where TVM looks for it."""
    import tvm_ffi

    names = ("TVMFFIErrorMoveFromRaised", "TVMFFIErrorSetRaised", "TVMFFIObjectDecRef")
    functions = [ctypes.cast(getattr(tvm_ffi.LIB, name), ctypes.c_void_p) for name in names]
    _library().sparsify_pool_set_error_functions(*functions)


@cache
def _library() -> ctypes.PyDLL:
    # PyDLL keeps the interpreter lock: the settings below take nanoseconds, and the launch itself
    # is called by compiled code only.
    library = ctypes.PyDLL(str(_library_path()))
    library.sparsify_pool_set_threads.argtypes = [ctypes.c_int]
    library.sparsify_pool_set_default.argtypes = [ctypes.c_int]
    library.sparsify_pool_set_spin.argtypes = [ctypes.c_int]
    library.sparsify_pool_set_error_functions.argtypes = [ctypes.c_void_p] * 3
    for void in ("set_default", "set_spin", "set_error_functions"):
        getattr(library, f"sparsify_pool_{void}").restype = None
    library.sparsify_pool_set_default(default_threads())
    return library


def _library_path() -> Path:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_pool{suffix}"
        if path.is_file():
            return path
    raise ImportError(
        f"the thread pool's library, _pool{EXTENSION_SUFFIXES[0]}, is not in {folder}: the "
        "package was not built for this Python. Install it again with a C compiler at hand: "
        "`pip install --force-reinstall --no-deps sparsify-compiler`, or in a checkout "
        "`pip install --no-build-isolation --no-deps -e .`"
    )
