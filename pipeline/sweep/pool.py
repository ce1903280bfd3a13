"""Stacks side by side: lanes that each train one stack after another, and one queue out of them.

A stack of small students does not keep all cores of a machine busy, nor a GPU: between its matrix products it waits for
memory and for Python. Stacks that run beside it fill the gaps, and whoever made the lanes stays free for tracking.

On a CPU under Linux each job is a process, forked when its turn comes: it has all that was read before at no cost,
and its Python waits for nobody else's, which is worth 6 % of a sweep. Elsewhere a job is a thread: on a GPU, with a
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
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

import torch

from pipeline.errors import WorkError
from pipeline.interrupts import STOP_SIGNALS, undo_on_exit
from pipeline.processes import cores

T = TypeVar("T")

GPU_LANES = 4
# How long Python lets one thread run while others wait. A job in a thread comes back to Python after every product, and
# would wait for the default of 5 ms each time while the thread that tracks is busy.
SWITCH_SECONDS = 2e-4
HEAR_SECONDS = 0.9  # for jobs to hear that they should stop
# What a process tells the one that it was forked from.
TOLD, VALUE, FAILED, ENDED = range(4)


def max_parallel_stacks(device: torch.device) -> int:
    """How many stacks a device can train side by side: one a core, or a few on a GPU."""
    return share_of_cores() if device.type == "cpu" else GPU_LANES


def share_of_cores() -> int:
    """Cores of this process's own, of those that it shares with the others of ``accelerate launch``."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def can_fork(device: torch.device) -> bool:
    """Whether jobs on a device are processes: after a fork neither CUDA works, nor the libraries of macOS."""
    has_fork = sys.platform == "linux" and hasattr(os, "fork") and sys.version_info < (3, 12)
    return device.type == "cpu" and has_fork and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


class StackPoolError(WorkError):
    """A job's process was killed."""


class Handle:
    """A job that was started.

    Args:
        pause: to be called by the job between two steps; true asks it to stop.
        tell: what the job tells while it goes on.

    Attributes:
        stops: 1 once the job has heard that it should stop.
    """

    def __init__(self, pause: Callable[[], bool], tell: Callable[[Any], None]) -> None:
        self.pause, self.tell = pause, tell
        self._cancelled, self.stops = _shared_integer(), _shared_integer()

    def cancel(self) -> None:
        """Ask the job to stop because nobody wants what it brings."""
        self._cancelled[0] = 1

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants what the job brings."""
        return bool(self._cancelled[0])


Job = Callable[[Handle], Iterator[T]]


class StackPool(Generic[T]):
    """Lanes for jobs; a job is an iterator whose values come out of `next`.

    Leaving the context asks all jobs to stop, and waits until they have.

    Args:
        number: how many.
        device: what the jobs compute on.
        hear: called, from any thread, with what jobs tell through their handle.
        fork: whether a job is a process rather than a thread.
    """

    def __init__(
        self, number: int, device: torch.device, hear: Callable[[Any], None], fork: bool | None = None
    ) -> None:
        self.number, self.device, self.hear = number, device, hear
        self.open = 0  # jobs started and not yet ended, as far as `next` has told
        self._run = self._in_process if (can_fork(device) if fork is None else fork) else self._in_thread
        self._jobs: queue.SimpleQueue[tuple[Job[T], Handle, Callable[[Handle], None]] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Handle, T | BaseException | None]] = queue.SimpleQueue()
        self._stopping, self._running = (_shared_integer() for _ in range(2))
        self._asked: float | None = None  # when jobs were asked to stop
        self._processes: dict[int, Handle] = {}
        self._threaded: dict[threading.Thread, Handle] = {}  # jobs that are threads
        self._lock = threading.Lock()  # of the count of running jobs, and of forks
        self._threads = [threading.Thread(target=self._work, name=f"lane {n}", daemon=True) for n in range(number)]

    def __enter__(self) -> StackPool[T]:
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        # What the libraries have made stays: looking through it again would hold up threads and copy processes' memory.
        gc.freeze()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        gc.unfreeze()
        sys.setswitchinterval(self._switch)

    def start(self, job: Job[T], ended: Callable[[Handle], None] = lambda job: None) -> Handle:
        """Run a job as soon as a lane is free, and then, from any thread, ``ended``; both are given its handle."""
        self.open += 1
        handle = Handle(lambda: self._hears(handle), self.hear)
        self._jobs.put((job, handle, ended))
        return handle

    def next(self, seconds: float) -> T | None:
        """The next value of any job, or nothing when a job has ended or time is up.

        Raises:
            LaneError: a job's process was killed.
            Exception: what a job raised.
        """
        try:
            handle, value = self._done.get(timeout=seconds)
        except queue.Empty:
            return None
        if value is None or isinstance(value, BaseException):
            self.open -= 1
        if isinstance(value, BaseException):
            raise value
        return None if handle.cancelled else value

    def ask_to_stop(self) -> None:
        """Ask all jobs to stop."""
        if self._asked is None:
            self._asked = time.monotonic()
            self._stopping[0] = 1
            for _ in self._threads:
                self._jobs.put(None)

    def stop(self) -> None:
        """Ask all jobs to stop, and wait until they have.

        One that does not hear it in time is in the middle of a step that takes long: a process is killed, a thread is
        left to end with this process.
        """
        self.ask_to_stop()
        assert self._asked is not None
        deadline = self._asked + HEAR_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for process, handle in list(self._processes.items()):
            if not handle.stops[0]:
                _kill(process)
        for thread in self._threads:
            job = self._threaded.get(thread)
            if job is None or job.stops[0]:
                thread.join()

    def _work(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            while (found := self._jobs.get()) is not None and not self._stopping[0]:
                job, handle, ended = found
                failed = None
                self._count(1)
                try:
                    for value in self._run(job, handle):
                        self._done.put((handle, value))
                except BaseException as error:
                    failed = error
                self._count(-1)
                ended(handle)
                self._done.put((handle, failed))

    def _count(self, change: int) -> None:
        with self._lock:
            self._running[0] += change

    def _pause(self) -> bool:
        """Share the cores with the jobs that run now; whether to stop."""
        threads = max(1, share_of_cores() // max(1, self._running[0]))
        if torch.get_num_threads() != threads:  # setting it anew at every step costs some per cent
            torch.set_num_threads(threads)
        return bool(self._stopping[0])

    def _hears(self, handle: Handle) -> bool:
        """Whether a job should stop, which it knows from then on."""
        handle.stops[0] = self._pause()
        return bool(handle.stops[0])

    def _in_thread(self, job: Job[T], handle: Handle) -> Iterator[T]:
        self._threaded[threading.current_thread()] = handle
        try:
            yield from job(handle)
        finally:
            del self._threaded[threading.current_thread()]

    def _in_process(self, job: Job[T], handle: Handle) -> Iterator[T]:
        """Run a job in a process forked here, in a thread that has computed nothing.

        So neither Python's nor OpenMP's threads are missing in it: those of OpenMP belong to the thread that made them.
        """
        here, there = Pipe(duplex=False)
        with self._lock:  # no other lane's process may hold this pipe open
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            parent, process = os.getpid(), os.fork()
            if process == 0:
                self._be_process(job, handle, there, parent, before)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            there.close()
            self._processes[process] = handle
        kind = None
        try:
            with undo_on_exit(functools.partial(_kill, process)):
                for kind, value in _received(here):
                    if kind == FAILED:
                        raise value
                    if kind == TOLD:
                        self.hear(value)
                    elif kind == VALUE:
                        yield value
        finally:
            here.close()
            _, status = os.waitpid(process, 0)
            del self._processes[process]
        if kind != ENDED:
            raise StackPoolError(
                f"training: a process {_how(status)}; what is finished is kept, the same command goes on"
            )

    def _be_process(self, job: Job[T], handle: Handle, there: Connection, parent: int, mask: set[int]) -> NoReturn:
        """Run a job and end; whoever stops the parent stops it through `_pause`."""

        def pause() -> bool:
            if os.getppid() != parent:  # it was killed; whoever goes on starts from what is kept
                os._exit(1)
            return self._hears(handle)

        try:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            handle.pause, handle.tell = pause, lambda what: there.send((TOLD, what))
            handle.pause()
            for value in job(handle):
                there.send((VALUE, value))
            there.send((ENDED, None))
        except BaseException as error:
            _send_error(there, error)
        finally:
            os._exit(0)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _received(here: Connection) -> Iterator[tuple[int, Any]]:
    """What a process sends until it ends."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield here.recv()


def _send_error(there: Connection, error: BaseException) -> None:
    """Send an error and the way that it has come, as itself where another process can make it again."""
    error.add_note(traceback.format_exc())
    try:
        copy.copy(error)
        there.send((FAILED, error))
    except Exception:  # whatever an error's constructor raises when it is given other arguments than its own
        there.send((FAILED, RuntimeError(traceback.format_exc())))


def _how(status: int) -> str:
    number = os.waitstatus_to_exitcode(status)
    if number >= 0:
        return f"ended with {number}"
    return f"was killed by {signal.Signals(-number).name}" + (", perhaps for want of memory" if number == -9 else "")


def _shared_integer() -> memoryview:
    """An integer, 0 at first, that processes forked later share with this one."""
    return memoryview(mmap.mmap(-1, 8)).cast("q")
