"""A pool of lanes that train stacks in parallel, one stack a lane at a time, and one queue for their results.

A small stack keeps neither all cores busy nor a GPU: between its matrix products it waits for memory and for Python.

On a CPU under Linux each job is a process, forked when a lane is free: it shares all that was read before at no cost,
and its Python waits for no other thread, which is worth 6 % of a sweep. Elsewhere a job is a thread: on a GPU, with a
stream of its own, because processes would take turns on the device; and from Python 3.12 on, which warns of forks
beside threads, because a lock that another thread held at that moment would never be released in the child.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import mmap
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, NoReturn, TypeVar

import torch

from pipeline.errors import WorkError
from pipeline.interrupts import STOP_SIGNALS, undo_on_exit
from pipeline.processes import cores

T = TypeVar("T")
Report = Callable[[Any], None]

GPU_LANES = 4
# How long Python lets one thread run while others wait. A job in a thread comes back to Python after every product, and
# would wait for the default of 5 ms each time while the thread that tracks is busy.
SWITCH_SECONDS = 2e-4
STOP_SECONDS = 0.9  # for jobs to notice that they should stop
REPORT, RESULT, FAILED, ENDED = range(4)  # kinds of message from a forked process


def max_parallel_stacks(device: torch.device) -> int:
    """How many stacks a device trains in parallel: one per core, or a few on a GPU."""
    return cores_of_process() if device.type == "cpu" else GPU_LANES


def cores_of_process() -> int:
    """This process's share of the cores, among the processes of ``accelerate launch``."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def can_fork(device: torch.device) -> bool:
    """Whether jobs on a device are processes: after a fork neither CUDA works, nor the libraries of macOS."""
    has_fork = sys.platform == "linux" and hasattr(os, "fork") and sys.version_info < (3, 12)
    return device.type == "cpu" and has_fork and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


class StackPoolError(WorkError):
    """A job's process was killed."""


def _shared_integer() -> memoryview:
    """An integer, 0 at first, that processes forked later share with this one."""
    return memoryview(mmap.mmap(-1, 8)).cast("q")


@dataclass(eq=False)
class JobHandle:
    """A started job."""

    should_stop: Callable[[], bool]  # called by the job between two steps; true asks it to stop
    report: Report  # called by the job with its progress
    process: int | None = None  # its number; None where the job is a thread
    noticed_stop: memoryview = field(default_factory=_shared_integer)  # 1 once the job has seen that it should stop
    _cancelled: memoryview = field(default_factory=_shared_integer)

    def cancel(self) -> None:
        """Ask the job to stop, and drop its results."""
        self._cancelled[0] = 1

    @property
    def is_cancelled(self) -> bool:
        """Whether the job's results are dropped."""
        return bool(self._cancelled[0])


Job = Callable[[JobHandle], Iterator[T]]
OnEnd = Callable[[JobHandle], None]


class StackPool(Generic[T]):
    """Lanes for jobs, which are iterators; a context, whose end asks all jobs to stop and waits until they have.

    ``on_report`` is called, from any thread, with what jobs report through their handle.
    """

    def __init__(self, size: int, device: torch.device, on_report: Report, fork: bool | None = None) -> None:
        self.size, self.device, self.on_report = size, device, on_report
        self.open_jobs = 0  # started, and their end not yet seen by `next_result`
        self._forks = can_fork(device) if fork is None else fork
        self._jobs: queue.SimpleQueue[tuple[Job[T], JobHandle, OnEnd] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[JobHandle, T | BaseException | None]] = queue.SimpleQueue()
        self._stopping, self._running = _shared_integer(), _shared_integer()
        self._stop_time: float | None = None  # when jobs were asked to stop
        self._current: dict[threading.Thread, JobHandle] = {}  # the job of each lane
        self._lock = threading.Lock()  # of the count of running jobs, and of forks
        self._threads = [threading.Thread(target=self._run_lane, name=f"lane {n}", daemon=True) for n in range(size)]

    def __enter__(self) -> StackPool[T]:
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        # Collecting the libraries' objects again and again would hold up threads and copy the memory of processes.
        gc.freeze()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
        gc.unfreeze()
        sys.setswitchinterval(self._switch)

    def start(self, job: Job[T], on_end: OnEnd = lambda handle: None) -> JobHandle:
        """Run a job as soon as a lane is free, and then, from any thread, ``on_end``; both receive its handle."""
        self.open_jobs += 1
        handle = JobHandle(lambda: self._notice_stop(handle), self.on_report)
        self._jobs.put((job, handle, on_end))
        return handle

    def next_result(self, seconds: float) -> T | None:
        """The next result of any job; None when a job has ended or time is up; raises what a job raised."""
        try:
            handle, value = self._results.get(timeout=seconds)
        except queue.Empty:
            return None
        if value is None or isinstance(value, BaseException):
            self.open_jobs -= 1
        if isinstance(value, BaseException):
            raise value
        return None if handle.is_cancelled else value

    def ask_to_stop(self) -> None:
        """Ask all jobs to stop."""
        if self._stop_time is None:
            self._stop_time = time.monotonic()
            self._stopping[0] = 1
            for _ in self._threads:
                self._jobs.put(None)

    def stop(self) -> None:
        """Ask all jobs to stop, and wait until they have."""
        # A job that does not notice it in time is in the middle of a long step: a process is killed, a thread ends with
        # this process.
        self.ask_to_stop()
        assert self._stop_time is not None
        for thread in self._threads:
            thread.join(max(0.0, self._stop_time + STOP_SECONDS - time.monotonic()))
        busy = {thread: job for thread, job in list(self._current.items()) if not job.noticed_stop[0]}
        for job in busy.values():
            if job.process is not None:
                _kill(job.process)
        for thread in self._threads:
            if self._forks or thread not in busy:
                thread.join()

    def _run_lane(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            while (found := self._jobs.get()) is not None and not self._stopping[0]:
                job, handle, on_end = found
                failure = None
                self._current[threading.current_thread()] = handle
                with self._lock:
                    self._running[0] += 1
                try:
                    for value in self._run_process(job, handle) if self._forks else job(handle):
                        self._results.put((handle, value))
                except BaseException as error:  # of any kind: `next_result` raises it again for the one who waits
                    failure = error
                with self._lock:
                    self._running[0] -= 1
                del self._current[threading.current_thread()]
                on_end(handle)
                self._results.put((handle, failure))

    def _notice_stop(self, handle: JobHandle) -> bool:
        """Whether a job should stop, which its handle then shows; in passing, share the cores among running jobs."""
        threads = max(1, cores_of_process() // max(1, self._running[0]))
        if torch.get_num_threads() != threads:  # setting it at every step costs some per cent
            torch.set_num_threads(threads)
        handle.noticed_stop[0] = self._stopping[0]
        return bool(handle.noticed_stop[0])

    def _run_process(self, job: Job[T], handle: JobHandle) -> Iterator[T]:
        """Run a job in a process forked from this thread."""
        # This thread has computed nothing, and OpenMP's threads belong to the thread that made them: none is missing in
        # the process.
        receiver, sender = Pipe(duplex=False)
        with self._lock:  # no other lane's process may hold this pipe open
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            parent, process = os.getpid(), os.fork()
            if process == 0:
                self._be_process(job, handle, sender, parent, mask)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sender.close()
            handle.process = process
        kind = None
        try:
            with undo_on_exit(functools.partial(_kill, process)):
                for kind, value in _messages(receiver):
                    if kind == FAILED:
                        raise value
                    if kind == REPORT:
                        self.on_report(value)
                    elif kind == RESULT:
                        yield value
        finally:
            receiver.close()
            _, status = os.waitpid(process, 0)
            handle.process = None
        if kind != ENDED:
            raise StackPoolError(
                f"training: a process {_describe_exit(status)}; what is finished is kept, the same command goes on"
            )

    def _be_process(self, job: Job[T], handle: JobHandle, sender: Connection, parent: int, mask: set[int]) -> NoReturn:
        """Run a job in the forked process and end it; the parent stops it through `_notice_stop`."""

        def should_stop() -> bool:
            if os.getppid() != parent:  # the parent was killed; the next worker starts from the snapshot
                os._exit(1)
            return self._notice_stop(handle)

        try:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            handle.should_stop, handle.report = should_stop, lambda value: sender.send((REPORT, value))
            handle.should_stop()
            for value in job(handle):
                sender.send((RESULT, value))
            sender.send((ENDED, None))
        except BaseException as error:  # of any kind: the parent raises it again, for this process only ends
            _send_error(sender, error)
        finally:
            os._exit(0)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _messages(receiver: Connection) -> Iterator[tuple[int, Any]]:
    """What a process sends until it ends."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield receiver.recv()


def _send_error(sender: Connection, error: BaseException) -> None:
    """Send an error with its traceback: as itself where it can be pickled, else as a RuntimeError."""
    error.add_note(traceback.format_exc())
    try:
        copy.copy(error)
        sender.send((FAILED, error))
    except Exception:  # whatever an error's constructor raises when it is given other arguments than its own
        sender.send((FAILED, RuntimeError(traceback.format_exc())))


def _describe_exit(status: int) -> str:
    number = os.waitstatus_to_exitcode(status)
    if number >= 0:
        return f"ended with {number}"
    return f"was killed by {signal.Signals(-number).name}" + (", perhaps for want of memory" if number == -9 else "")
