"""Processes that tests wait for, and kill one after the other."""

import os
import subprocess
import sys
import time
from pathlib import Path

GIVEN = "TEST_LINE"
PATIENCE = 400  # seconds: with two busy cores a sweep may take minutes to start; less than the limit of a test


def wait_until(condition, process=None, step=0.05):
    """Wait until a condition holds, and tell what it gave; a process given has to be alive meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process is None or process.poll() is None, "the process ended before that"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(step)
    return found


def start(program, *arguments, **environment):
    """Start a Python program that calls `each_line`; its standard input and output are pipes."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def each_line(work):
    """Do work on each line of the standard input in a process of its own; tell its number, and then how it ended.

    It is forked, so that the libraries are loaded once; without forks the program runs anew for each line.
    """
    if (given := os.environ.pop(GIVEN, None)) is not None:
        work(given)
        return
    out = sys.stdout
    for line in map(str.strip, sys.stdin):
        if hasattr(os, "fork"):
            child = os.fork()
            if child == 0:
                work(line)
                os._exit(0)
            out.write(f"{child}\n")
            out.flush()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            process = subprocess.Popen(sys.orig_argv, env={**os.environ, GIVEN: line}, stdin=subprocess.DEVNULL)
            out.write(f"{process.pid}\n")
            out.flush()
            code = process.wait()
        out.write(f"{code}\n")
        out.flush()
