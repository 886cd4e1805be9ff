"""Runs each case in a child process, so that neither a crash nor an endless loop ends the run."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.peers.onnx_node_tests.cases import Case
from tests.peers.onnx_node_tests.outcome import Outcome

_LENGTH = struct.Struct("<Q")


class Pool:
    """A few forked workers, warm with all that this process has imported.

    Args:
        check: what a worker does with a case.
        jobs: workers at a time.
        seconds: a worker that computes longer at one case is ended, also one that waits for ten
            times as long.
    """

    def __init__(self, check: Callable[[Case], Outcome], jobs: int = 1, seconds: float = 30.0):
        self._check, self._jobs, self._seconds = check, jobs, seconds

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome]]:
        """Yields each case with its outcome as it is known."""
        waiting = list(reversed(cases))
        workers = [_Worker(self._check, self._seconds) for _ in range(min(self._jobs, len(cases)))]
        try:
            for worker in workers:
                worker.take(waiting.pop())
            while busy := [w for w in workers if w.case is not None]:
                ready, _, _ = select.select([w.results for w in busy], [], [], 0.5)
                for worker in busy:
                    late = time.monotonic() - worker.started > 10 * self._seconds
                    if worker.results not in ready and not late:
                        continue
                    case, outcome = worker.finish(late)
                    if outcome.verdict == "crashed":
                        worker.end()
                        worker.__init__(self._check, self._seconds)  # type: ignore[misc]
                    if waiting:
                        worker.take(waiting.pop())
                    yield case, outcome
        finally:
            for worker in workers:
                worker.end()


class _Worker:
    def __init__(self, check: Callable[[Case], Outcome], seconds: float) -> None:
        work, self.work = os.pipe()
        self.results, results = os.pipe()
        self.case: Case | None = None
        self.started = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.work)
            os.close(self.results)
            _serve(check, seconds, work, results)
        os.close(work)
        os.close(results)

    def take(self, case: Case) -> None:
        self.case, self.started = case, time.monotonic()
        _send(self.work, case)

    def finish(self, late: bool) -> tuple[Case, Outcome]:
        assert self.case is not None
        case, self.case = self.case, None
        if late:
            return case, Outcome("crashed", "it does not come to an end")
        outcome = _receive(self.results)
        if outcome is None:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            name = signal.Signals(status).name if os.WIFSIGNALED(status) else f"status {status}"
            outcome = Outcome("crashed", f"the process died of {name}")
        return case, outcome

    def end(self) -> None:
        os.close(self.work)
        os.close(self.results)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _serve(check: Callable[[Case], Outcome], seconds: float, work: int, results: int) -> None:
    """What a worker does until it is ended; it never returns."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        while (case := _receive(work)) is not None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            _send(results, check(case))
    finally:
        os._exit(0)


def _send(pipe: int, value: Any) -> None:
    body = pickle.dumps(value)
    rest = memoryview(_LENGTH.pack(len(body)) + body)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _receive(pipe: int) -> Any:
    """The next value, None at the end of the pipe."""
    head = _read(pipe, _LENGTH.size)
    return None if head is None else pickle.loads(_read(pipe, *_LENGTH.unpack(head)) or b"N.")


def _read(pipe: int, count: int) -> bytes | None:
    body = b""
    while len(body) < count:
        part = os.read(pipe, count - len(body))
        if not part:
            return None
        body += part
    return body
