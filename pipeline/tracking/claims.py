"""Who trains which cell: workers that know each other only through the runs of MLflow.

A worker claims a cell by making its run, or by taking over one that was left, with its own name in the tag ``owner``.
MLflow has neither locks nor unique names, so a claim is made in three steps: claim, wait until everyone who looked at
the same time has claimed too, look again. The run with the least id and the owner that stands there then are what all
see. A worker shows that it lives, and which results version it has, by a tag on the parent run that changes every
few seconds; clocks are never compared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from pipeline.interrupts import raise_if_interrupted
from pipeline.tracking import MlflowRun, Run, Tracker, TrackingError, retry_tracking, wait_for_peers

BEAT_SECONDS = 5.0
GONE_SECONDS = 30.0  # without a beat

log = logging.getLogger(__name__)


def _birth(pid: int) -> str:
    """When a process of this machine started, in the kernel's own units; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _place() -> str:
    """This boot of this machine and its process namespace: where process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot[:13]}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def worker_name() -> str:
    """This process, unlike any other anywhere: host, process number, its start, and where the number has a meaning."""
    return f"{socket.gethostname()}/{os.getpid()}/{_birth(os.getpid())}/{_place()}"


def _is_known_dead(name: str) -> bool:
    """Whether that worker ran where we can look, and is no more."""
    _, pid, birth, place = name.rsplit("/", 3)
    return place == _place() and bool(birth) and _birth(int(pid)) != birth


class Claims:
    """The claims of one worker; as a context it shows that the worker lives.

    Args:
        tracker: the tracking server.
        sweep_id: the sweep.
        version: of the code that this worker runs.
        gone: finished runs whose student is gone from MLflow, whose cells are to be trained again.
    """

    def __init__(self, tracker: Tracker, sweep_id: str, version: str, gone: Iterable[MlflowRun] = ()) -> None:
        self.tracker, self.sweep_id, self.version = tracker, sweep_id, version
        self._gone = {(run.info.run_id, run.info.end_time) for run in gone}  # once finished again they have another
        self.me = worker_name()
        self.parent: Run | None = None
        self._seen: dict[str, tuple[str, float]] = {}  # of each worker the last beat, and when we first saw it
        self._silent: set[str] = set()  # workers of other versions that died
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def open_parent(self, name: str, tags: Mapping[str, str]) -> Run:
        """The sweep's parent run, the same for all its workers."""
        return retry_tracking(lambda: self.tracker.open_sweep(self.sweep_id, name, tags, self._is_at_work))

    def other_version(self, work_key: str) -> tuple[str, str, str] | None:
        """Who is at the same work, under whatever sweep id, with another results version.

        Only a beat that changes while we look tells: the dead leave one that stands still.

        Returns:
            A sweep, a worker of it that lives, and its version.
        """
        begin = time.monotonic()
        first: dict[str, str] = {}
        while beats := self._beats_of_other_versions(work_key):
            if not first:
                hosts = ", ".join({owner.split("/")[0] for owner in beats})
                log.info("%s: another results version; waiting up to %.0f s for a sign of life", hosts, GONE_SECONDS)
            for owner, (sweep_id, beat) in beats.items():
                if first.setdefault(owner, beat) != beat:
                    return sweep_id, owner.split("/")[0], beat.partition(" ")[2]
            if time.monotonic() - begin > GONE_SECONDS:
                self._silent |= set(beats)
            time.sleep(1)
        return None

    def _beats_of_other_versions(self, work_key: str) -> dict[str, tuple[str, str]]:
        """Of each worker of another version that may live, its sweep and its beat."""
        return {
            owner: (run.data.tags["sweep_id"], beat)
            for run in retry_tracking(lambda: self.tracker.under_way(work_key))
            for owner, beat in _beats(run).items()
            if beat.partition(" ")[2] not in ("", self.version)
            and owner not in self._silent
            and not _is_known_dead(owner)
        }

    def join(self, parent: Run) -> Claims:
        """Work below a parent run: ``with claims.join(parent):``."""
        self.parent = parent
        return self

    def __enter__(self) -> Claims:
        retry_tracking(lambda: self._show(0))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.leave()

    def leave(self) -> None:
        """Tell the others that this worker is gone."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(*TrackingError):  # the tags say that we are gone, which silence says too
            self._look(self.parent_run.client.get_run(self.parent_run.id))
            gone = [owner for owner in self._seen if not self._lives(owner)]
            for owner in {self.me, *gone}:
                self.parent_run.client.delete_tag(self.parent_run.id, f"worker.{owner}")

    def take(self, cells: Sequence[tuple[str, str]], tags: Mapping[str, str]) -> dict[str, MlflowRun]:
        """Claim cells that nobody has finished and nobody alive is at.

        Args:
            cells: the key and the name of each.
            tags: further tags of their runs.

        Returns:
            Of the cells that are ours now, the runs by key.
        """
        return retry_tracking(lambda: self._take(cells, tags))

    def _take(self, cells: Sequence[tuple[str, str]], tags: Mapping[str, str]) -> dict[str, MlflowRun]:
        begin = time.monotonic()
        known = self.runs()
        claimed = set()
        for key, name in cells:
            raise_if_interrupted()
            runs = known.get(key, [])
            if any(self.is_finished(run) or self._is_held(run) for run in runs):
                continue
            claimed.add(key)
            own = {"owner": self.me}
            if runs:
                self.tracker.reopen_child(min(runs, key=_id), own)
            else:
                labels = {**tags, "role": "cell", "cell_key": key, "sweep_id": self.sweep_id, **own}
                self.tracker.open_child(self.parent_run, name, labels)
        if not claimed:
            return {}
        wait_for_peers(begin)
        ours = {}
        for key, runs in self.runs().items():
            if key not in claimed:
                continue
            chosen = min(runs, key=lambda run: (not self.is_finished(run), _id(run)))
            for run in runs:  # what lost, and what crashes have left
                if run is not chosen and not self._is_held(run):
                    self.tracker.discard(run, "claimed by another worker")
            if not self.is_finished(chosen) and chosen.data.tags["owner"] == self.me:
                ours[key] = chosen
        return ours

    def runs(self) -> dict[str, list[MlflowRun]]:
        """All runs of the sweep's cells by cell key; finds out who lives on the way."""
        self._look(self.tracker.client.get_run(self.parent_run.id))
        found: dict[str, list[MlflowRun]] = {}
        for run in self.tracker.cells(self.sweep_id):
            found.setdefault(run.data.tags["cell_key"], []).append(run)
        return found

    def is_finished(self, run: MlflowRun) -> bool:
        """Whether a cell's run is finished, and its student was not found gone."""
        return run.info.status == "FINISHED" and (run.info.run_id, run.info.end_time) not in self._gone

    def unfinished(self) -> list[Run]:
        """The runs that we have claimed, also those of a claim that was cut short, and not finished."""
        return [
            Run(self.tracker.client, run.info.run_id, run.info.experiment_id)
            for run in self.tracker.cells(self.sweep_id)
            if run.info.status == "RUNNING" and run.data.tags.get("owner") == self.me
        ]

    def still_ours(self, run: Run) -> MlflowRun | None:
        """A run that we claimed as it stands now; None if another took it over or finished it, or it was deleted."""
        now = self.tracker.client.get_run(run.id)
        is_open = now.info.status != "FINISHED" and now.info.lifecycle_stage == "active"
        return now if is_open and now.data.tags["owner"] == self.me else None

    def others_at_work(self) -> bool:
        """Whether another worker of the sweep lives."""
        return self._is_at_work(self.tracker.client.get_run(self.parent_run.id))

    @property
    def parent_run(self) -> Run:
        """The run below which this worker works."""
        assert self.parent is not None, "claims are made below a parent run"
        return self.parent

    def _is_held(self, run: MlflowRun) -> bool:
        """Whether somebody else who lives is at a run."""
        owner = run.data.tags.get("owner", self.me)
        return run.info.status == "RUNNING" and owner != self.me and self._lives(owner)

    def _is_at_work(self, parent: MlflowRun) -> bool:
        self._look(parent)
        return any(owner != self.me and self._lives(owner) for owner in _beats(parent))

    def _lives(self, owner: str) -> bool:
        if owner not in self._seen or _is_known_dead(owner):
            return False
        return time.monotonic() - self._seen[owner][1] < GONE_SECONDS

    def _look(self, parent: MlflowRun) -> None:
        """Note the beats of all workers."""
        now, before = time.monotonic(), self._seen
        self._seen = {
            owner: before[owner] if owner in before and before[owner][0] == beat else (beat, now)
            for owner, beat in _beats(parent).items()
        }

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(BEAT_SECONDS):
            number += 1
            try:
                self._show(number)
                self._look(self.tracker.client.get_run(self.parent_run.id))
            except Exception as reason:  # out of reach for all workers alike; the work itself will say so
                log.debug("heartbeat: %s", reason)

    def _show(self, number: int) -> None:
        self.parent_run.set_tags({f"worker.{self.me}": f"{number} {self.version}"})


def _beats(parent: MlflowRun) -> dict[str, str]:
    """The last beat of each worker below a parent run: a number, and the worker's results version."""
    tags = parent.data.tags.items()
    return {tag.removeprefix("worker."): str(beat) for tag, beat in tags if tag.startswith("worker.")}


def _id(run: MlflowRun) -> str:
    return str(run.info.run_id)
