"""Commands of the program as processes of their own, without the ten seconds that Python takes to load its libraries.

A process of each test worker loads them once, and every command is a fork of it, which then runs as
``python -m pipeline`` does: with arguments, environment, folder, output and signals of its own.
"""

import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LONGEST = 1 << 17  # bytes of a request
NOT_ENDED = None


class Command:
    """A running command, with the methods of `subprocess.Popen` that tests use; its output is text in pipes."""

    def __init__(self, *arguments, module="pipeline", environment=None, folder=None, new_session=False, quiet=False):
        request = {
            "arguments": [module, *map(str, arguments)], "environment": {**os.environ, **(environment or {})},
            "folder": str(folder or Path.cwd()), "new_session": new_session,
        }  # fmt: skip
        pipes = [os.pipe() for _ in range(3)]
        out, err, self._status = (os.fdopen(read, encoding="utf-8", errors="replace") for read, _ in pipes)
        self.stdout, self.stderr, self.returncode = out, err, NOT_ENDED
        given = [write for _, write in pipes]
        if quiet:
            for write in given[:2]:
                os.dup2(_null(), write)
        socket.send_fds(_loaded(), [json.dumps(request).encode()], given)
        for write in given:
            os.close(write)
        self.pid = int(self._status.readline())

    def poll(self):
        """The exit status, or None while it runs."""
        if self.returncode is NOT_ENDED and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout=None):
        """Wait for the exit status."""
        if self.returncode is NOT_ENDED:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("pipeline", timeout)
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for the end; what is left of standard output and standard error."""
        end, texts = None if timeout is None else time.monotonic() + timeout, {self.stdout: [], self.stderr: []}
        open_pipes = list(texts)
        while open_pipes:
            left = None if end is None else max(0, end - time.monotonic())
            if not (ready := select.select(open_pipes, [], [], left)[0]):
                raise subprocess.TimeoutExpired("pipeline", timeout)
            for pipe in ready:
                if part := os.read(pipe.fileno(), 1 << 16):
                    texts[pipe].append(part)
                else:
                    open_pipes.remove(pipe)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        return tuple(b"".join(parts).decode(errors="replace") for parts in texts.values())

    def finish(self):
        """Wait for a good end; standard output."""
        out, err = self.communicate()
        assert self.returncode == 0, err
        return out

    def send_signal(self, number):
        """Send a signal unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        """End it at once."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _loaded():
    """The socket of the process that has loaded the libraries."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen([sys.executable, __file__], stdin=theirs, start_new_session=True)
    theirs.close()
    return ours


def _serve():
    """Fork a process for each request; returns, in that process, what to run there."""
    import mlflow.store.tracking.sqlalchemy_store
    import transformers.models.llama.modeling_llama

    import pipeline.commands.evaluate
    import pipeline.commands.extract
    import pipeline.commands.report
    import pipeline.commands.sweep

    del mlflow, transformers, pipeline
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait
    requests = socket.socket(fileno=0)
    while True:
        message, given, *_ = socket.recv_fds(requests, LONGEST, 3)
        if not message:
            os._exit(0)
        if os.fork():
            for one in given:
                os.close(one)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requests.close()
        out, err, status = given
        child = os.fork()
        if child:
            os.close(out)
            os.close(err)
            os.write(status, f"{child}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.write(status, f"{code}\n".encode())
            os._exit(0)
        os.close(status)
        return _become(json.loads(message), out, err)


@functools.cache
def _null():
    return os.open(os.devnull, os.O_RDWR)


def _become(request, out, err):
    if request["new_session"]:
        os.setsid()
    for number, one in enumerate((_null(), out, err)):
        os.dup2(one, number)
        os.close(one)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    err_options = {"encoding": "utf-8", "errors": "backslashreplace", "buffering": 1}
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, **err_options)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["folder"]
    for name in ("random", "numpy.random"):
        sys.modules[name].seed()
    return request["arguments"]


if __name__ == "__main__":
    module, *rest = _serve()
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
