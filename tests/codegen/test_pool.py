"""The thread pool: right results, no deadlock, no spinning, no threads left behind."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsify.codegen.runtime import pool


class Env(ctypes.Structure):
    """TVMParallelGroupEnv of tvm/runtime/c_backend_api.h."""

    _fields_ = [("sync_handle", ctypes.c_void_p), ("num_task", ctypes.c_int32)]


Task = Callable[[int, "ctypes._Pointer[Env]"], int]
TASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(Env), ctypes.c_void_p)
NATIVE = ctypes.CDLL(str(pool._library_path()))  # unlike PyDLL, frees the interpreter lock
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def launch(task: Task, num_task: int = 0) -> int:
    return int(NATIVE.sparsify_pool_launch(TASK(lambda i, env, _: task(i, env)), None, num_task))


def barrier(i: int, env: "ctypes._Pointer[Env]") -> int:
    return int(NATIVE.sparsify_pool_barrier(i, env))


def tasks_of_a_launch(num_task: int = 0) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []

    def task(i: int, env: "ctypes._Pointer[Env]") -> int:
        seen.append((i, env.contents.num_task))
        return 0

    assert launch(task, num_task) == 0
    return sorted(seen)


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture(scope="module")
def parallel_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parallel loops compiled by TVM: y = x + 1, and one that raises at a negative number."""
    import tvm
    import tvm_ffi
    from tvm.script import tirx as T

    @tvm_ffi.register_global_func("test_pool.refuse", override=True)
    def refuse(i: int) -> None:
        raise ValueError(f"a negative number at {i}")

    @T.prim_func
    def add_one(x: T.handle, y: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n,), "float32")
        Y = T.match_buffer(y, (n,), "float32")
        for i in T.parallel(n):
            Y[i] = X[i] + T.float32(1)

    @T.prim_func
    def refuse_negative(x: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n,), "float32")
        for i in T.parallel(n):
            if i == 0:  # keeps the caller busy while a worker starts on the other half
                T.evaluate(T.call_extern("int32", "usleep", 50000))
            if X[i] < T.float32(0):
                T.evaluate(T.call_packed("test_pool.refuse", i))

    functions = {"add_one": add_one, "refuse_negative": refuse_negative}
    module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in functions.items()})
    path = tmp_path_factory.mktemp("parallel") / "parallel.so"
    tvm.compile(module, target={"kind": "llvm"}).export_library(str(path))
    return path


def load(library: Path, name: str) -> Callable[..., None]:
    import tvm

    function = tvm.runtime.load_module(str(library))[name]
    pool.redirect(library)
    return function


@pytest.fixture(scope="module")
def add_one(parallel_library: Path) -> Callable[[np.ndarray], np.ndarray]:
    import tvm

    function = load(parallel_library, "add_one")

    def run(x: np.ndarray) -> np.ndarray:
        y = tvm.runtime.tensor(np.zeros_like(x))
        function(tvm.runtime.tensor(x), y)
        return y.numpy()

    return run


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_task_runs_once_and_knows_their_number(n: int) -> None:
    with pool.use_threads(n):
        for _ in range(50):
            assert tasks_of_a_launch() == [(i, n) for i in range(n)]


def test_a_number_of_tasks_is_kept_up_to_the_thread_limit() -> None:
    with pool.use_threads(3):
        assert tasks_of_a_launch(2) == [(0, 2), (1, 2)]
        assert tasks_of_a_launch(8) == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_tvm_loop_is_right(add_one: Callable[[np.ndarray], np.ndarray], size: int, n: int) -> None:
    x = np.arange(size, dtype="float32")
    with pool.use_threads(n):
        for _ in range(20):
            np.testing.assert_array_equal(add_one(x), x + 1)


def test_redirect_fills_the_slot_of_the_loaded_library(
    parallel_library: Path, add_one: Callable[[np.ndarray], np.ndarray]
) -> None:
    slot = ctypes.c_void_p.in_dll(ctypes.CDLL(str(parallel_library)), pool.LAUNCH_SLOT)
    ours = ctypes.cast(NATIVE.sparsify_pool_launch, ctypes.c_void_p)
    assert slot.value == ours.value


@LINUX
def test_redirected_library_starts_the_threads_asked_for(parallel_library: Path) -> None:
    run_python(f"""
        import numpy as np, tvm
        from pathlib import Path
        from sparsify.codegen.runtime import pool
        count = lambda: len(list(Path("/proc/self/task").iterdir()))
        add_one = tvm.runtime.load_module({str(parallel_library)!r})["add_one"]
        pool.redirect({str(parallel_library)!r})
        x = tvm.runtime.tensor(np.zeros(64, "float32"))
        before = count()
        for threads, started in [(1, 0), (3, 2), (2, 2), (4, 3)]:
            pool.set_threads(threads)
            add_one(x, x)
            assert count() == before + started, (threads, count() - before)
    """)


def test_two_callers_at_the_same_time(add_one: Callable[[np.ndarray], np.ndarray]) -> None:
    wrong: list[int] = []

    def call(offset: int) -> None:
        pool.set_threads(2)
        x = np.arange(500, dtype="float32") + offset
        for _ in range(200):
            if not np.array_equal(add_one(x), x + 1):
                wrong.append(offset)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert wrong == []


def test_second_caller_runs_alone_while_the_pool_is_taken() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold(i: int, env: "ctypes._Pointer[Env]") -> int:
        inside.set()
        return 0 if leave.wait(60) else 1

    def first() -> None:
        pool.set_threads(2)
        results.append(launch(hold))

    results: list[int] = []
    caller = threading.Thread(target=first)
    caller.start()
    assert inside.wait(60)
    try:
        with pool.use_threads(2):
            assert tasks_of_a_launch() == [(0, 1)]
    finally:
        leave.set()
        caller.join(60)
    assert results == [0]
    with pool.use_threads(2):  # and the pool is free again
        assert tasks_of_a_launch() == [(0, 2), (1, 2)]


def test_nested_launch_runs_alone() -> None:
    inner: list[list[tuple[int, int]]] = []

    def outer(i: int, env: "ctypes._Pointer[Env]") -> int:
        pool.set_threads(2)
        inner.append(tasks_of_a_launch())
        return 0

    with pool.use_threads(2):
        assert launch(outer) == 0
    assert inner == [[(0, 1)], [(0, 1)]]


def test_barrier_lets_nobody_pass_before_the_last() -> None:
    arrived: list[int] = []
    seen_after: list[int] = []

    def task(i: int, env: "ctypes._Pointer[Env]") -> int:
        time.sleep(0.01 * i)
        arrived.append(i)
        result = barrier(i, env)
        seen_after.append(len(arrived))
        return result

    with pool.use_threads(3):
        assert launch(task) == 0
    assert seen_after == [3, 3, 3]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_failure_is_returned_and_frees_those_at_the_barrier(failing: int) -> None:
    at_barrier: list[int] = []

    def task(i: int, env: "ctypes._Pointer[Env]") -> int:
        if i == failing:
            return 7
        at_barrier.append(barrier(i, env))
        return 0

    with pool.use_threads(3):
        assert launch(task) == 7
        assert set(at_barrier) <= {-1}
        assert tasks_of_a_launch() == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("bad", [0, 1])  # in the caller's task, in the worker's
def test_error_raised_by_a_task_reaches_the_caller(parallel_library: Path, bad: int) -> None:
    import tvm

    refuse_negative = load(parallel_library, "refuse_negative")
    x = np.ones(2, "float32")
    x[bad] = -1
    with pool.use_threads(2), pytest.raises(ValueError, match=f"a negative number at {bad}"):
        refuse_negative(tvm.runtime.tensor(x))
    refuse_negative(tvm.runtime.tensor(np.ones(2, "float32")))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_child_of_a_fork_gets_its_own_workers() -> None:
    with pool.use_threads(2):
        assert launch(barrier) == 0  # the parent has a worker
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a lost worker would hang at the barrier
            os._exit(0 if launch(barrier) == 0 and len(tasks_of_a_launch()) == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert launch(barrier) == 0


def test_idle_pool_burns_no_cpu_time() -> None:
    with pool.use_threads(3):
        assert launch(barrier) == 0
        start = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start < 0.1  # three spinning threads would burn 0.5 to 1


@LINUX
def test_short_lived_callers_leave_no_threads() -> None:
    def call() -> None:
        pool.set_threads(2)
        assert launch(barrier) == 0

    with pool.use_threads(2):
        assert launch(barrier) == 0
    before = thread_count()
    for _ in range(50):
        caller = threading.Thread(target=call)
        caller.start()
        caller.join(60)
    deadline = time.monotonic() + 10  # join returns a moment before the thread is gone
    while thread_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread_count() <= before


def test_thread_count_belongs_to_the_calling_thread() -> None:
    seen: list[int] = []

    def other() -> None:
        seen.append(pool.threads())
        pool.set_threads(5)

    with pool.use_threads(3):
        caller = threading.Thread(target=other)
        caller.start()
        caller.join(60)
        assert pool.threads() == 3
        with pool.use_threads(4):
            assert pool.threads() == 4
        assert pool.threads() == 3
    assert seen == [pool.default_threads()]


@pytest.mark.parametrize("n", [0, -1, 100_000])
def test_impossible_thread_count_is_refused(n: int) -> None:
    before = pool.threads()
    with pytest.raises(ValueError, match=f"number of threads: {n} is not within 1 to"):
        pool.set_threads(n)
    with pytest.raises(ValueError, match="number of threads"), pool.use_threads(n):
        pass
    assert pool.threads() == before


def test_impossible_spin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"-1 us is not within"):
        pool.set_spin(-1)


def test_redirect_of_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no library at"):
        pool.redirect(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(OSError, match=r"text\.so"):
        pool.redirect(tmp_path / "text.so")


def test_missing_pool_library_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "EXTENSION_SUFFIXES", [".absent.so"])
    with pytest.raises(ImportError, match=r"_pool\.absent\.so, is not in .*`pip install"):
        pool._library_path()


def run_python(code: str) -> None:
    lines = code.splitlines()[1:]
    indent = len(lines[0]) - len(lines[0].lstrip())
    program = "\n".join(line[indent:] for line in lines)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
