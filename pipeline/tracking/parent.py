"""The parent run of a sweep: one for all workers, also for those that start at the same moment."""

from __future__ import annotations

import contextlib
import operator
import os
import time
from collections.abc import Callable, Mapping

from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.interrupts import close_on_interrupt, sleep
from pipeline.tracking.experiment import RUN, occupied
from pipeline.tracking.runs import Run
from pipeline.tracking.tracker import Tracker

PEER_SECONDS = 1.0  # longer than a worker needs to look for a run and, where there is none, to create it
IsAtWork = Callable[[MlflowRun], bool]
id_of = operator.attrgetter("info.run_id")  # all workers order runs by it


def open_sweep(tracker: Tracker, sweep_id: str, name: str, tags: Mapping[str, str], is_at_work: IsAtWork) -> Run:
    """Open the parent run of a sweep, the same for all workers that ask at the same time."""
    # A sweep of the same id goes on in the same run. Under ``mlflow run`` the run that it opened is the parent, unless
    # others are at work on the sweep.
    begin, client, opened = time.monotonic(), tracker.client, os.environ.get(RUN)
    if opened:
        current = client.get_run(opened)
        if current.info.status == "FINISHED" and current.data.tags.get("sweep_id", sweep_id) != sweep_id:
            raise occupied(current)
    earlier = {run.info.run_id: run for run in tracker.runs("sweep", sweep_id=sweep_id)}
    usable = [run for run in earlier.values() if opened is None or is_at_work(run)]
    newest = max(usable, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
    if (parent := earlier.get(opened or "", newest)) is None:
        own = tracker.open_run(name, {**tags, "sweep_id": sweep_id, "role": "candidate"})
        with close_on_interrupt(lambda: own.end("KILLED")):
            wait_for_peers(time.monotonic() - begin)
            parent = _elect(tracker, sweep_id, set(earlier), is_at_work)
    run = tracker.as_run(parent)
    with close_on_interrupt(lambda: None if is_at_work(client.get_run(run.id)) else run.end("KILLED")):
        # The tags that the sweep's first worker recorded stay.
        new_tags = {key: value for key, value in tags.items() if key not in parent.data.tags}
        tracker.reopen(parent, new_tags | {"role": "sweep"})
        for candidate in tracker.runs("candidate", sweep_id=sweep_id):
            tracker.discard(candidate, f"took part in sweep {sweep_id}, whose cells are below run {run.id}")
        _adopt_cells(tracker, sweep_id, earlier, run)
        if opened not in (None, run.id):
            tracker.discard(client.get_run(opened), f"sweep {sweep_id} goes on in run {run.id}")
    return run


def _adopt_cells(tracker: Tracker, sweep_id: str, earlier: Mapping[str, MlflowRun], run: Run) -> None:
    """Move the cells whose parent was deleted or is unfinished below the run."""
    keeping = {run_id for run_id, parent in earlier.items() if parent.info.status == "FINISHED"} | {run.id}
    if earlier and set(earlier) <= keeping:
        return
    for cell in tracker.runs("cell", sweep_id=sweep_id):
        if cell.data.tags[MLFLOW_PARENT_RUN_ID] not in keeping:
            tracker.client.set_tag(cell.info.run_id, MLFLOW_PARENT_RUN_ID, run.id)


def _elect(tracker: Tracker, sweep_id: str, earlier: set[str], is_at_work: IsAtWork) -> MlflowRun:
    """Elect one parent among the candidates of several workers."""
    # Runs have no unique names, and workers do not see the same candidates: a slow one comes late, a quick one has
    # looked early. So each worker marks the candidate with the least id that it sees, and waits until all have. Then
    # all see the same marked runs, and choose the least of those below which a worker lives, or the least of all.

    def marked() -> list[MlflowRun]:
        return [run for run in tracker.runs("sweep", sweep_id=sweep_id) if run.info.run_id not in earlier]

    found: list[MlflowRun] = []
    while not found:
        begin = time.monotonic()
        if standing := marked() or tracker.runs("candidate", sweep_id=sweep_id):
            with contextlib.suppress(MlflowException):  # a worker that saw a lesser one has removed this one
                tracker.client.set_tag(min(standing, key=id_of).info.run_id, "role", "sweep")
        wait_for_peers(time.monotonic() - begin)
        found = marked()
    parent = min([run for run in found if is_at_work(run)] or found, key=id_of)
    for run in found:
        if run is not parent:
            tracker.discard(run, f"took part in sweep {sweep_id}, whose cells are below run {parent.info.run_id}")
    return parent


def wait_for_peers(seconds: float) -> None:
    """Wait until all workers that looked at the same time have created what they found missing.

    Args:
        seconds: that this worker took from its look to what it created last.
    """
    sleep(max(PEER_SECONDS, 2 * seconds))  # others may take twice as long
