"""Ctrl-C and SIGTERM in every phase: what is open is closed, and the process is gone within a fixed time.

Python handles a signal between two of its own instructions, and a decomposition of a large matrix is one instruction; a
library may also swallow the exception that the signal becomes, and a server may not answer. A thread notices the signal
at once. What the main thread has not closed soon, the thread closes in its place; and when time is up it ends the
process, whatever goes on in it. What is finished is on disk by then.
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
# All of these are counted from the signal.
CLOSE_SECONDS = 0.4  # for the main thread to close what is open, before the watching thread helps
AGAIN_SECONDS = 0.5  # a signal that comes later is a second one: launchers hand on the first to those who have had it
END_SECONDS = 1.5
LINE = "interrupted: what is finished is kept; the same command goes on from there"
CODE = 130
SHOW_CURSOR = "\x1b[?25h"  # which progress bars hide

_closers: list[Callable[[], None]] = []
_undoers: list[Callable[[], None]] = []
_stopped = threading.Event()  # a signal has come
_answered = threading.Event()  # the main thread has noticed it


@contextlib.contextmanager
def close_on_interrupt(close: Callable[[], None]) -> Iterator[None]:
    """Where the command is interrupted while the context is open, ``close`` is called once, the newest first.

    The thread that leaves the context calls it, or the watching thread where that one is late. Its errors are passed
    over: what could not be closed is found dead by the next to come.

    Raises:
        KeyboardInterrupt: the command was interrupted, also where a library has made another error of it.
    """
    once = _once(close)
    _closers.append(once)
    try:
        yield
    except BaseException as error:
        if _stopped.is_set() or isinstance(error, KeyboardInterrupt):
            once()
            raise KeyboardInterrupt from error
        raise
    finally:
        _closers.remove(once)


@contextlib.contextmanager
def undo_on_exit(undo: Callable[[], None]) -> Iterator[None]:
    """Where the process is ended while the context is open, ``undo`` is called before; it must take no time."""
    _undoers.append(undo)
    try:
        yield
    finally:
        _undoers.remove(undo)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt where the command was interrupted: for threads, which no signal reaches."""
    if _stopped.is_set():
        raise KeyboardInterrupt


def sleep(seconds: float) -> None:
    """Sleep, in any thread, until the command is interrupted.

    Raises:
        KeyboardInterrupt: it was.
    """
    _stopped.wait(seconds)
    raise_if_interrupted()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Turn signals into KeyboardInterrupt, after which the process ends in time, whatever it does.

    The main thread enters it, before libraries are loaded. Processes that are forked meanwhile inherit nothing of it
    that acts.

    Raises:
        KeyboardInterrupt: the command was interrupted, also where a library has made another error of it, or none.
    """

    def answer(_number: int, _frame: object) -> None:
        if not _answered.is_set():
            _answered.set()
            _stop()
            raise KeyboardInterrupt

    _stopped.clear()
    _answered.clear()
    read, write = os.pipe()
    os.set_blocking(write, False)
    atexit.register(_end)  # the first to be registered is the last to be called
    before = {number: signal.signal(number, answer) for number in STOP_SIGNALS}
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
        os.write(write, b"\0")  # no signal: the thread ends
        thread.join()
        os.close(read)
        os.close(write)
        atexit.unregister(_end)


def exit_interrupted() -> NoReturn:
    """End the process after an interruption.

    Python would go on to take its objects apart one by one, which takes seconds with torch loaded; so the last of the
    functions that are called at exit ends it.
    """
    with contextlib.suppress(OSError, ValueError):  # nobody reads on
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
    while (rest := begin + END_SECONDS - time.monotonic()) > 0:
        if select.select([read], [], [], rest)[0]:
            os.read(read, 1)
            if time.monotonic() - begin > AGAIN_SECONDS:
                break
    _end()


def _stop() -> None:
    _stopped.set()
    logging.disable()  # some libraries that are half loaded tell at exit what they have in store


def _close() -> None:
    time.sleep(CLOSE_SECONDS)
    is_open = bool(_closers or _undoers)
    for close in reversed(_closers.copy()):
        close()
    # Nothing more will come of a main thread that is in one long call, or that has nothing left to close.
    if not (is_open and _answered.is_set()):
        atexit._run_exitfuncs()


def _end() -> NoReturn:
    for undo in reversed(_undoers.copy()):
        with contextlib.suppress(Exception):
            undo()
    _say()
    os._exit(CODE)


def _once(work: Callable[[], None]) -> Callable[[], None]:
    """Work that is done by the first who calls for it; others wait until it is done."""
    lock, todo = threading.Lock(), [work]

    def call() -> None:
        with lock, contextlib.suppress(Exception):
            if todo:
                todo.pop()()

    return call


def _write_line() -> None:
    begin = f"\n{SHOW_CURSOR}" if os.isatty(2) else ""  # after the ^C and a progress bar
    if select.select([], [2], [], 0)[1]:  # nobody is waited for who does not read
        os.write(2, f"{begin}{LINE}\n".encode())


_say = _once(_write_line)
