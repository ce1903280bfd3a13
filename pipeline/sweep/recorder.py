"""A worker's cells in MLflow: claimed before they train, shown while they train, uploaded when they are finished.

One thread writes everything, in order, in few large requests, while the pool trains on. Each upload may be repeated, so
a server that goes away costs only the wait; what is not uploaded stays in the spool.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.analysis.rows import Row
from pipeline.data.dataset import Dataset
from pipeline.errors import InputError
from pipeline.settings import Cell
from pipeline.sweep.spool import Spool
from pipeline.tracking import Metric, MlflowRun, Run, Tracker, TrackingError, retry_tracking
from pipeline.tracking.claims import Claims
from pipeline.training.stack import EpochResult

FLUSH_SECONDS = (15.0, 120.0)  # between two uploads of running cells' curves, at the least and at the most
FLUSH_SHARE = 0.01  # of the time at the most is spent on them
CURVE = "val_cosine"  # a metric that every logged epoch has


class Recorder:
    """The runs of the cells that this worker trains, by the key of each cell, with common tags."""

    def __init__(
        self, claims: Claims, data: Dataset, spool: Spool, keys: Mapping[Cell, str], tags: Mapping[str, str]
    ) -> None:
        self.claims, self.data, self.spool, self.keys, self.tags = claims, data, spool, keys, tags
        self.open_runs: dict[str, Run] = {}
        self._epochs: dict[str, dict[int, tuple[int, EpochResult]]] = {key: {} for key in keys.values()}
        self._last_logged: dict[str, int] = {}
        self._next_flush = time.monotonic() + FLUSH_SECONDS[0]

    def claim(self, cells: Sequence[Cell]) -> list[Cell]:
        """Claim cells; the ones that this worker may train."""
        named = [(self.keys[cell], self.data.omit_default(cell).name) for cell in cells]
        runs = retry_tracking(lambda: self.claims.claim_cells(named, self.tags))
        for key, run in runs.items():
            self.open_runs[key] = self.claims.tracker.as_run(run)
            if CURVE not in run.data.metrics:
                self._last_logged[key] = 0
        return [cell for cell in cells if self.keys[cell] in runs]

    def note_epoch(self, step: EpochResult) -> None:
        """Remember an epoch for the next `flush`; any thread may call it."""
        self._epochs[self.keys[step.cell]][step.epoch] = (int(time.time() * 1000), step)

    def flush(self) -> None:
        """Log the epochs of running cells from time to time; what does not get through is logged later."""
        if (begin := time.monotonic()) < self._next_flush:
            return
        for key, run in list(self.open_runs.items()):
            with contextlib.suppress(*TrackingError):
                steps = [step for _, step in list(self._epochs[key].values())]
                losses = {step.epoch: step.train_loss for step in steps if step.train_loss is not None}
                curves = {"train_loss": losses, "val_cosine": {step.epoch: step.val_cosine for step in steps}}
                self._log_curves(key, run, curves)
        (least, most), end = FLUSH_SECONDS, time.monotonic()
        self._next_flush = end + min(most, max(least, (end - begin) / FLUSH_SHARE))

    def upload(self, key: str, row: Row) -> Row | None:
        """Upload a finished cell from the spool; its row with the run's id, or None where another worker claimed it."""
        run, now = self.open_runs.get(key), int(time.time() * 1000)
        is_ours = run is not None and retry_tracking(functools.partial(self._upload, key, row, run, now))
        self.open_runs.pop(key, None)
        if run is None or not is_ours:
            self.spool.remove_own_cell(key)
            return None
        self.spool.remove_cell(key)
        return row | {"run_id": run.id}

    def _upload(self, key: str, row: Row, run: Run, now: int) -> bool:
        """Upload a cell; whether it was still this worker's. It may be repeated."""
        if (current := self.claims.reread_claim(run)) is None:
            return False
        if (folder := self.spool.folder_of(key)) is None:  # another worker on this disk has tracked it
            self.claims.tracker.discard(current, "finished by another worker")
            return False
        model_id = run.log_student(folder / "student", current, cell_key=key)
        values = dict(row["curves"])
        epochs = values.pop("epoch")
        curves = {name: dict(zip(epochs, values[name], strict=True)) for name in values}
        names = [name for name in row if name.startswith(("val_", "test_")) and isinstance(row[name], float)]
        names += ["parameters", "best_epoch", "train_seconds"]
        # Those of the kept checkpoint are dated after all curves: MLflow shows and sorts by the last of a name.
        final = [Metric(name, row[name], now + 1, epochs[-1], model_id=model_id) for name in names]
        params = {name: row[name] for name in Cell.__dataclass_fields__} | {"teacher": self.data.vectors.teacher}
        tags = {"dtype": row["dtype"]}  # no parameter, which could not change where another machine takes over
        self._log_curves(key, run, curves, final, params=params, tags=tags)
        run.log_artifact(folder / "cell.json", current)
        run.end("FINISHED")
        return True

    def _log_curves(
        self, key: str, run: Run, curves: Mapping[str, Mapping[int, float]], metrics: Sequence[Metric] = (), **rest: Any
    ) -> None:
        """Log the epochs of curves (values by epoch) that no worker has logged yet, and more in the same request."""
        if key not in self._last_logged:
            self._last_logged[key] = run.last_step(CURVE)
        last, now = self._last_logged[key], int(time.time() * 1000)
        times = {epoch: at for epoch, (at, _) in list(self._epochs[key].items())}
        new = [
            Metric(name, value, times.get(epoch, now), epoch)  # may be logged again with the same date without effect
            for name, values in curves.items()
            for epoch, value in values.items()
            if epoch > last
        ]
        run.log(metrics=[*new, *metrics], **rest)
        self._last_logged[key] = max([last, *(metric.step for metric in new)])

    def rows_of_others(self, cells: Sequence[Cell]) -> dict[str, Row]:
        """The rows, by key, of those cells that another worker has finished."""

        def read() -> dict[str, Row]:
            runs, claims = self.claims.runs({self.keys[cell] for cell in cells}), self.claims
            finished = {key: run for key, own in runs.items() for run in own if claims.is_finished(run)}
            return {key: read_row(claims.tracker, run) for key, run in finished.items()}

        return retry_tracking(read) if cells else {}


def finished_rows(tracker: Tracker, keys: Collection[str], sweep_id: str) -> tuple[dict[str, Row], list[MlflowRun]]:
    """The rows of finished cells by key, and the runs of those whose row or student is gone from MLflow."""
    found, gone = tracker.finished_cells(keys, sweep_id)
    rows = {}
    for key, run in found.items():
        try:
            rows[key] = read_row(tracker, run)
        except (InputError, ValueError):  # the file was removed, or is no JSON
            gone.append(run)
    return rows, gone


def read_row(tracker: Tracker, run: MlflowRun) -> Row:
    """The row of a finished cell's run."""
    row: Row = json.loads(tracker.artifact(run, "cell.json")) | {"run_id": run.info.run_id}
    return row
