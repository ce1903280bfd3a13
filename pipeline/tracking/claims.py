"""Claims: which worker trains which cell, among workers that know each other only through MLflow's runs.

A worker claims a cell by creating its run, or by taking over an unfinished one, with its own name in the tag ``owner``.
MLflow has neither locks nor unique names, so a claim takes three steps: claim, wait until all workers that looked at
the same time have claimed too, look again. The run with the least id and the owner that it has then are what all see.
A heartbeat, a tag on the parent run that changes every few seconds, shows that a worker lives and which results version
it has; clocks are never compared.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mlflow.entities import Run as MlflowRun
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.interrupts import raise_if_interrupted
from pipeline.tracking.parent import id_of, open_sweep, wait_for_peers
from pipeline.tracking.runs import Run
from pipeline.tracking.server import TrackingError, retry_tracking
from pipeline.tracking.tracker import Tracker

BEAT_SECONDS = 5.0
CELLS_PER_LOOK = 100  # so many cells are claimed after one look: workers wait twice as long as this takes
SILENCE_SECONDS = 30.0  # without a beat, after which a worker counts as dead

log = logging.getLogger(__name__)


def worker_name() -> str:
    """Name this process uniquely: host, process number, its start time, and the namespace of process numbers."""
    return f"{socket.gethostname()}/{os.getpid()}/{_start_time(os.getpid())}/{_pid_namespace()}"


def _start_time(pid: int) -> str:
    """When a process of this machine started, in the kernel's own units; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _pid_namespace() -> str:
    """This boot of this machine and its process namespace, within which a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot[:13]}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _is_known_dead(worker: str) -> bool:
    """Whether a worker ran in this process namespace and has ended."""
    _, pid, start, namespace = worker.rsplit("/", 3)
    return namespace == _pid_namespace() and bool(start) and _start_time(int(pid)) != start


class Claims:
    """The claims of one worker, whose code makes results of a version.

    Finished runs ``without_student``, which was deleted from MLflow, count as unfinished.
    """

    parent_run: Run  # set by `below`

    def __init__(
        self, tracker: Tracker, sweep_id: str, version: str, without_student: Iterable[MlflowRun] = ()
    ) -> None:
        self.tracker, self.sweep_id, self.version = tracker, sweep_id, version
        self._without_student = {run.info.run_id: run for run in without_student}
        self.me = worker_name()
        self._seen: dict[str, tuple[str, float]] = {}  # by worker: the last beat, and when this worker first saw it
        self._silent: set[str] = set()  # dead workers of other versions
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def open_parent(self, name: str, tags: Mapping[str, str]) -> Run:
        """Open the sweep's parent run, the same for all its workers; see `open_sweep`."""
        return retry_tracking(lambda: open_sweep(self.tracker, self.sweep_id, name, tags, self.has_live_peers))

    def find_other_version(self, work_key: str) -> tuple[str, str, str] | None:
        """Find sweep, host and version of a live worker at the same work that has another results version."""
        begin = time.monotonic()  # only a beat that changes meanwhile counts: dead workers leave one that stands still
        first: dict[str, str] = {}
        while beats := self._beats_of_other_versions(work_key):
            if not first:
                hosts = ", ".join({worker.split("/")[0] for worker in beats})
                log.info("%s: another results version; waiting up to %.0f s for a heartbeat", hosts, SILENCE_SECONDS)
            for worker, (sweep_id, beat) in beats.items():
                if first.setdefault(worker, beat) != beat:
                    return sweep_id, worker.split("/")[0], _version(beat)
            if time.monotonic() - begin > SILENCE_SECONDS:
                self._silent |= set(beats)
            time.sleep(1)
        return None

    def _beats_of_other_versions(self, work_key: str) -> dict[str, tuple[str, str]]:
        """The sweep and the beat of each worker of another version that may live."""
        return {
            worker: (run.data.tags["sweep_id"], beat)
            for run in retry_tracking(lambda: self.tracker.runs("sweep", "RUNNING", work_key=work_key))
            for worker, beat in _beats(run).items()
            if _version(beat) not in ("", self.version) and worker not in self._silent and not _is_known_dead(worker)
        }

    @contextlib.contextmanager
    def below(self, parent: Run) -> Iterator[None]:
        """Claim below a parent run, with a heartbeat on it, while the context lasts."""
        self.parent_run = parent
        retry_tracking(lambda: self._show_beat(0))
        self._thread.start()
        try:
            yield
        finally:
            self.withdraw()

    def withdraw(self) -> None:
        """End the heartbeat, and remove it and those of dead workers from the parent run."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(*TrackingError):  # silence says the same
            self._see_beats()
            dead = [worker for worker in self._seen if not self._is_alive(worker)]
            for worker in {self.me, *dead}:
                self.tracker.client.delete_tag(self.parent_run.id, f"worker.{worker}")

    def claim_cells(self, cells: Sequence[tuple[str, str]], tags: Mapping[str, str]) -> dict[str, MlflowRun]:
        """Claim cells (key and name) that nobody has finished and no live worker is at; the runs won, by key."""
        claimed: set[str] = set()
        longest, ours = 0.0, {}
        for start in range(0, len(cells), CELLS_PER_LOOK):
            begin = time.monotonic()
            claimed |= self._mark(dict(cells[start : start + CELLS_PER_LOOK]), tags)
            longest = max(longest, time.monotonic() - begin)
        if not claimed:
            return {}
        wait_for_peers(longest)
        for key, runs in self.runs(claimed).items():
            chosen = min(runs, key=lambda run: (not self.is_finished(run), id_of(run)))
            for run in runs:  # lost claims, and what crashes have left
                if run is not chosen and not self._is_held(run):
                    self.tracker.discard(run, "claimed by another worker")
            if not self.is_finished(chosen) and chosen.data.tags["owner"] == self.me:
                ours[key] = chosen
        return ours

    def _mark(self, names: Mapping[str, str], tags: Mapping[str, str]) -> set[str]:
        """Look for cells (names by key), and put this worker's name on those that are free; their keys."""
        known, claimed = self.runs(names), set()
        for key, name in names.items():
            raise_if_interrupted()
            runs = known[key]
            if any(self.is_finished(run) or self._is_held(run) for run in runs):
                continue
            claimed.add(key)
            if runs:
                self.tracker.reopen(min(runs, key=id_of), {"owner": self.me})
            else:
                own = {"role": "cell", "cell_key": key, "sweep_id": self.sweep_id, "owner": self.me}
                self.tracker.create_run(name, {**tags, **own, MLFLOW_PARENT_RUN_ID: self.parent_run.id})
        return claimed

    def runs(self, keys: Collection[str]) -> defaultdict[str, list[MlflowRun]]:
        """The sweep's runs of some cell keys by key, after a look at all heartbeats."""
        self._see_beats()
        found = defaultdict(list)
        lost = {run_id for run_id, run in self._without_student.items() if run.data.tags["cell_key"] in keys}
        for run in self.tracker.cells(keys, self.sweep_id, lost):
            found[run.data.tags["cell_key"]].append(run)
        return found

    def is_finished(self, run: MlflowRun) -> bool:
        """Whether a cell's run is finished, and its student was not deleted."""
        lost = self._without_student.get(run.info.run_id)
        # With another end time it was trained again.
        return run.info.status == "FINISHED" and (lost is None or lost.info.end_time != run.info.end_time)

    def close_unfinished(self, status: str) -> None:
        """Close the runs that this worker has claimed and not finished, also those of a claim that was cut short."""
        for run in self.tracker.runs("cell", "RUNNING", sweep_id=self.sweep_id, owner=self.me):
            self.tracker.as_run(run).end(status)

    def reread_claim(self, run: Run) -> MlflowRun | None:
        """Read a claimed run again; None where another worker took it over or finished it, or it was deleted."""
        current = self.tracker.client.get_run(run.id)
        is_open = current.info.status != "FINISHED" and current.info.lifecycle_stage == "active"
        return current if is_open and current.data.tags["owner"] == self.me else None

    def has_live_peers(self, parent: MlflowRun | None = None) -> bool:
        """Whether another worker lives below a parent run, by default this worker's, read now."""
        self._see_beats(parent)
        return any(worker != self.me and self._is_alive(worker) for worker in self._seen)

    def _is_held(self, run: MlflowRun) -> bool:
        """Whether another live worker is at a run."""
        owner = run.data.tags.get("owner", self.me)
        return run.info.status == "RUNNING" and owner != self.me and self._is_alive(owner)

    def _is_alive(self, worker: str) -> bool:
        if worker not in self._seen or _is_known_dead(worker):
            return False
        return time.monotonic() - self._seen[worker][1] < SILENCE_SECONDS

    def _see_beats(self, parent: MlflowRun | None = None) -> None:
        """Note the beats of all workers, and when this worker first saw each."""
        parent = parent or self.tracker.client.get_run(self.parent_run.id)
        now, before = time.monotonic(), self._seen
        self._seen = {
            worker: before[worker] if worker in before and before[worker][0] == beat else (beat, now)
            for worker, beat in _beats(parent).items()
        }

    def _beat(self) -> None:
        for number in itertools.count(1):
            if self._stop.wait(BEAT_SECONDS):
                return
            try:
                self._show_beat(number)
                self._see_beats()
            except Exception as reason:  # out of reach for all workers alike; the work itself reports it
                log.debug("heartbeat: %s", reason)

    def _show_beat(self, number: int) -> None:
        self.parent_run.set_tags({f"worker.{self.me}": f"{number} {self.version}"})


def _beats(parent: MlflowRun) -> dict[str, str]:
    """The last beat of each worker below a parent run: a number, and the worker's results version."""
    tags = parent.data.tags.items()
    return {tag.removeprefix("worker."): str(beat) for tag, beat in tags if tag.startswith("worker.")}


def _version(beat: str) -> str:
    return beat.partition(" ")[2]
