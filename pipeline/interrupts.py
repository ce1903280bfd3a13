"""Ctrl-C and SIGTERM in every phase, also where one long call of a library keeps Python from noticing.

Python handles a signal between two of its own instructions, and a decomposition of a large matrix is one instruction. A
thread notices the signal meanwhile: where the main thread has not answered it in time, the thread closes what is open
and ends the process. What is finished is on disk by then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STOPS = (signal.SIGINT, signal.SIGTERM)
ANSWER_SECONDS = 1.0  # for the main thread to begin to close what is open
CLOSE_SECONDS = 0.8  # for the watching thread to do so in its place
LINE = "interrupted: what is finished is kept; the same command goes on from there"
CODE = 130

_closers: list[Callable[[], None]] = []


@contextlib.contextmanager
def closed_by(close: Callable[[], None]) -> Iterator[None]:
    """While the context is open, ``close`` is what the watching thread calls, the newest first."""
    _closers.append(close)
    try:
        yield
    finally:
        _closers.remove(close)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Turn signals into KeyboardInterrupt, and end the process where the main thread cannot be interrupted.

    The main thread enters it. Processes that are forked meanwhile inherit nothing of it that acts.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    answered = threading.Event()

    def answer(_number: int, _frame: object) -> None:
        answered.set()
        raise KeyboardInterrupt

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(read, 1)[0] in STOPS:
                if not answered.wait(ANSWER_SECONDS):
                    _end()

    before = {number: signal.signal(number, answer) for number in STOPS}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(write, b"\0")  # no signal: the thread ends
        thread.join()
        os.close(read)
        os.close(write)


def _end() -> None:
    def close() -> None:
        for own in reversed(_closers):
            with contextlib.suppress(Exception):  # what cannot be closed is found dead by the next to come
                own()

    closing = threading.Thread(target=close, name="closing", daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)
    sys.stderr.write(f"\n{LINE}\n")
    sys.stderr.flush()
    os._exit(CODE)
