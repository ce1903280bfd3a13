"""Jobs in parallel, as threads and as processes: their results, how they stop, and how they fail."""

import os
import select
import signal
import time

import pytest
import torch
from processes import PATIENCE, wait_until

from pipeline.errors import InputError, WorkError
from pipeline.sweep.pool import StackPool, StackPoolError

CPU = torch.device("cpu")


class OddError(Exception):
    """An error that cannot be made again from its message."""

    def __init__(self, place, reason):
        super().__init__(f"{place}: {reason}")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_fork)], ids=["threads", "processes"])
def fork(request):
    return request.param


def run_jobs(pool, jobs):
    """All results of jobs, once all have ended."""
    for job in jobs:
        pool.start(job)
    values, until = [], time.monotonic() + PATIENCE
    while pool.open_jobs and time.monotonic() < until:
        if (value := pool.next_result(1.0)) is not None:
            values.append(value)
    assert pool.open_jobs == 0
    return values


def test_jobs_bring_their_results_in_order_and_report_on_the_way(fork):
    reports = []

    def job_of(name):
        def job(handle):
            for number in range(20):
                handle.report((name, number))
                yield name, number

        return job

    with StackPool(2, CPU, reports.append, fork) as pool:
        values = run_jobs(pool, [job_of(name) for name in "abc"])
    for found in (values, reports):
        for name in "abc":
            assert [number for own, number in found if own == name] == [*range(20)]


def test_a_job_is_a_process_where_that_is_asked_for(fork):
    with StackPool(2, CPU, print, fork) as pool:
        places = run_jobs(pool, [lambda handle: iter([os.getpid()])] * 3)
    assert (os.getpid() in places) is not fork
    assert len(set(places)) == (3 if fork else 1)


def test_lanes_that_stop_ask_every_job_and_wait_for_it(fork, tmp_path):
    def job(handle):
        handle.report("begun")
        while not handle.should_stop():
            time.sleep(0.01)
        (tmp_path / str(time.time_ns())).touch()
        yield from ()

    reports = []
    with StackPool(2, CPU, reports.append, fork) as pool:
        for _ in range(3):
            pool.start(job)
        wait_until(lambda: len(reports) == 2)
    assert len(list(tmp_path.iterdir())) == 2  # the third had not begun


def test_a_cancelled_job_brings_nothing_and_what_is_to_follow_it_follows(fork):
    reports, ended = [], []

    def job(handle):
        handle.report("begun")
        while not handle.is_cancelled:
            time.sleep(0.01)
        yield "unwanted"

    with StackPool(1, CPU, reports.append, fork) as pool:
        handle = pool.start(job, ended.append)
        wait_until(lambda: reports)
        handle.cancel()
        assert run_jobs(pool, []) == []
    assert ended == [handle]


@pytest.mark.parametrize("error", [InputError("--layer 99: no such layer"), KeyError("name")])
def test_an_error_of_a_job_is_raised_as_itself(fork, error):
    def job(handle):
        raise error
        yield

    with StackPool(1, CPU, print, fork) as pool, pytest.raises(type(error)) as raised:
        run_jobs(pool, [job])
    assert raised.value.args == error.args
    if fork:
        assert "in job" in "".join(raised.value.__notes__)


@needs_fork
def test_an_error_that_cannot_travel_is_told_with_its_way():
    def job(handle):
        raise OddError("cell", "broken")
        yield

    with StackPool(1, CPU, print, fork=True) as pool, pytest.raises(RuntimeError, match="OddError: cell: broken"):
        run_jobs(pool, [job])


@needs_fork
def test_a_process_that_is_killed_is_one_clear_line_and_the_others_go_on():
    def job(handle):
        yield "before"
        os.kill(os.getpid(), signal.SIGKILL)

    with StackPool(1, CPU, print, fork=True) as pool:
        with pytest.raises(StackPoolError, match=r"killed by SIGKILL, perhaps for want of memory; .* the same command"):
            run_jobs(pool, [job])
        assert run_jobs(pool, [lambda handle: iter(["after"])]) == ["after"]
    assert issubclass(StackPoolError, WorkError)


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_reaches_the_whole_group_is_the_parents_to_act_on(number):
    def job(handle):
        os.kill(os.getpid(), number)
        yield "went on"

    with StackPool(1, CPU, print, fork=True) as pool:
        assert run_jobs(pool, [job]) == ["went on"]


@needs_fork
def test_processes_end_with_a_parent_that_was_killed():
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:

        def job(handle):
            os.write(writer, f"{os.getpid()}\n".encode())
            while not handle.should_stop():
                time.sleep(0.01)
            yield

        with StackPool(1, CPU, print, fork=True) as pool:
            pool.start(job)
            time.sleep(60)
        os._exit(1)
    os.close(writer)
    assert int(os.read(reader, 20)) not in (0, parent)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert select.select([reader], [], [], 20)[0]
    assert os.read(reader, 1) == b""  # nobody is left who could write
    os.close(reader)


@needs_fork
def test_processes_compute_on_several_threads_though_the_parent_has_done_so():
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(2)
    expected = a @ a

    def job(handle):
        torch.set_num_threads(2)
        for dtype in (torch.float32, torch.bfloat16):
            product = a.to(dtype) @ a.to(dtype)
        weights = a.clone().requires_grad_()
        (weights @ weights).sum().backward()
        yield (product.float() - expected).abs().max().item(), weights.grad.shape

    with StackPool(2, CPU, print, fork=True) as pool:
        values = run_jobs(pool, [job] * 4)
    assert len(values) == 4
    assert all(error < 2 and shape == a.shape for error, shape in values)
