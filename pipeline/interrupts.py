"""Ctrl-C and SIGTERM in every phase: open resources are closed, and the process ends within a fixed time.

Python handles a signal only between two bytecode instructions, and the decomposition of a large matrix is one; a
library may also swallow the KeyboardInterrupt, and a server may not answer. So a thread watches for signals. It closes
what the main thread has not closed in time, and then ends the process. Finished work is on disk by then.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Times after the signal.
CLOSE_SECONDS = 0.4  # the watching thread begins to close what is still open
POLL_SECONDS = 0.05
AGAIN_SECONDS = 0.5  # a later signal counts as a second one; launchers repeat the first one at once
END_SECONDS = 1.5  # the process ends if all is closed
LAST_SECONDS = 6.0  # the process ends: a busy machine closes slowly, a server that does not answer never
LINE = "interrupted: what is finished is kept; the same command goes on from there"
CODE = 130
SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it

_closers: list[Callable[[], None]] = []
_undoers: list[Callable[[], None]] = []
_interrupted = threading.Event()  # a signal has arrived
_handled = threading.Event()  # the main thread has raised KeyboardInterrupt
_closed = threading.Event()  # all that was open is closed


@contextlib.contextmanager
def close_on_interrupt(close: Callable[[], None]) -> Iterator[None]:
    """Call ``close`` once if the command is interrupted within the context; the innermost context closes first."""
    # The thread that leaves the context calls it, or, if that is late, the watching thread. Its errors are ignored:
    # later commands recognise what was not closed. A library may raise another error instead of KeyboardInterrupt.
    once = _once(close)
    _closers.append(once)
    try:
        yield
    except BaseException as error:  # whatever a library makes of an interruption; anything else goes on unchanged
        if _interrupted.is_set() or isinstance(error, KeyboardInterrupt):
            once()
            raise KeyboardInterrupt from error
        raise
    finally:
        _closers.remove(once)


@contextlib.contextmanager
def undo_on_exit(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo``, which must be fast, if the watching thread ends the process within the context."""
    _undoers.append(undo)
    try:
        yield
    finally:
        _undoers.remove(undo)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if the command was interrupted: for threads, which receive no signals."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def sleep(seconds: float) -> None:
    """Sleep in any thread; an interruption ends the sleep with KeyboardInterrupt."""
    _interrupted.wait(seconds)
    raise_if_interrupted()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Turn signals into KeyboardInterrupt, and end the process `LAST_SECONDS` after a signal at the latest."""
    # To be entered by the main thread before libraries are loaded. Forked processes do not inherit it. At the end, an
    # interruption is raised again, in case a library raised another error instead, or none.

    def handle(_number: int, _frame: object) -> None:
        if not _handled.is_set():
            _handled.set()
            _stop()
            raise KeyboardInterrupt

    _interrupted.clear()
    _handled.clear()
    _closed.clear()
    read, write = os.pipe()
    os.set_blocking(write, False)
    atexit.register(_end)  # registered first, so called last
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(read,), name="interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        raise_if_interrupted()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(write, b"\0")  # ends the thread
        thread.join()
        os.close(read)
        os.close(write)
        atexit.unregister(_end)


def exit_interrupted() -> NoReturn:
    """End the process after an interruption."""
    # The last exit handler ends it at once: Python's own shutdown takes seconds with torch loaded.
    with contextlib.suppress(OSError, ValueError):  # the reader of standard output is gone
        sys.stdout.flush()
    _say()
    sys.exit(CODE)


def _watch(read: int) -> None:
    while (number := os.read(read, 1)[0]) not in STOP_SIGNALS:
        if not number:
            return
    begin = time.monotonic()
    _stop()
    threading.Thread(target=_close, name="closing", daemon=True).start()
    while (passed := time.monotonic() - begin) < (END_SECONDS if _closed.is_set() else LAST_SECONDS):
        if select.select([read], [], [], POLL_SECONDS)[0]:
            os.read(read, 1)
            if passed > AGAIN_SECONDS:
                break
    _end()


def _stop() -> None:
    _interrupted.set()
    logging.disable()  # partly loaded libraries log at exit


def _close() -> None:
    time.sleep(CLOSE_SECONDS)
    is_open = bool(_closers or _undoers)
    for close in reversed(_closers.copy()):
        close()
    _closed.set()
    # The main thread is in one long call, or had nothing to close and swallowed the interruption.
    if not (is_open and _handled.is_set()):
        atexit._run_exitfuncs()


def _end() -> NoReturn:
    for undo in reversed(_undoers.copy()):
        with contextlib.suppress(Exception):
            undo()
    _say()
    os._exit(CODE)


def _once(work: Callable[[], None]) -> Callable[[], None]:
    """A function that does the work at its first call; concurrent callers wait until it is done."""
    lock, todo = threading.Lock(), [work]

    def call() -> None:
        with lock, contextlib.suppress(Exception):
            if todo:
                todo.pop()()

    return call


def _write_line() -> None:
    begin = f"\n{SHOW_CURSOR}" if os.isatty(2) else ""  # after the ^C and a progress bar
    if select.select([], [2], [], 0)[1]:  # skip the line if standard error is blocked
        os.write(2, f"{begin}{LINE}\n".encode())


_say = _once(_write_line)
