"""Stacks side by side: threads that each train one stack after another, and one queue out of them.

A stack of small students does not keep all cores of a machine busy, nor a GPU: between its matrix products it waits for
memory and for Python. Stacks that run beside it fill the gaps. The thread that made the lanes stays free for tracking.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

GPU_LANES = 4
# How long Python lets one thread run while others wait. A lane comes back to Python after every product, and would wait
# for the default of 5 ms each time while the thread that tracks is busy.
SWITCH_SECONDS = 2e-4


def room(device: torch.device) -> int:
    """How many stacks a device can train side by side: one a core, or a few on a GPU."""
    return cores() if device.type == "cpu" else GPU_LANES


def cores() -> int:
    """Cores that this process may use, of those that it shares with the others of ``accelerate launch``."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass
class Handle:
    """A job that was started.

    Attributes:
        pause: to be called by the job between two steps; true asks it to stop.
        cancelled: whether it is asked to stop because nobody wants what it brings.
    """

    pause: Callable[[], bool]
    cancelled: bool = False


Job = Callable[[Handle], Iterator[T]]


class Lanes(Generic[T]):
    """Threads for jobs; a job is an iterator whose values come out of `next`.

    Leaving the context asks all jobs to stop, and waits until they have.

    Args:
        number: how many.
        device: what the jobs compute on.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self.number, self.device = number, device
        self.open = 0  # jobs started and not yet ended, as far as `next` has told
        self._jobs: queue.SimpleQueue[tuple[Job[T], Handle] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Handle, T | BaseException | None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._running: set[int] = set()
        self._threads = [threading.Thread(target=self._work, name=f"lane {n}", daemon=True) for n in range(number)]

    def __enter__(self) -> Lanes[T]:
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.freeze()  # what the libraries have made stays: looking through it again would hold up every lane
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        gc.unfreeze()
        sys.setswitchinterval(self._switch)

    def start(self, job: Job[T]) -> Handle:
        """Run a job as soon as a lane is free; it is given its handle."""
        self.open += 1
        handle = Handle(self._pause)
        self._jobs.put((job, handle))
        return handle

    def next(self, seconds: float) -> T | None:
        """The next value of any job, or nothing when a job has ended or time is up.

        Raises:
            Exception: what a job raised.
        """
        try:
            handle, value = self._done.get(timeout=seconds)
        except queue.Empty:
            return None
        if value is None:
            self.open -= 1
        if isinstance(value, BaseException):
            raise value
        return None if handle.cancelled else value

    def stop(self) -> None:
        """Ask all jobs to stop, and wait until they have."""
        self._stopping.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            while (found := self._jobs.get()) is not None and not self._stopping.is_set():
                job, handle = found
                self._running.add(threading.get_ident())
                try:
                    for value in job(handle):
                        self._done.put((handle, value))
                    self._done.put((handle, None))
                except BaseException as error:
                    self._done.put((handle, error))
                self._running.discard(threading.get_ident())

    def _pause(self) -> bool:
        """Share the cores with the jobs that run now; whether to stop."""
        threads = max(1, cores() // max(1, len(self._running)))
        if torch.get_num_threads() != threads:  # setting it anew at every step costs some per cent
            torch.set_num_threads(threads)
        return self._stopping.is_set()
