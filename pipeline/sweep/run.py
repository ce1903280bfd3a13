"""A sweep: a shard's cells trained and tracked beside any number of other workers, until all rows are there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.analysis.rows import Row
from pipeline.data.dataset import Dataset
from pipeline.devices import bfloat16_hint, training_precision
from pipeline.errors import InputError, WorkError
from pipeline.interrupts import close_on_interrupt
from pipeline.processes import Worker
from pipeline.settings import RESULTS_VERSION, Cell
from pipeline.sweep.cells import cell_key, work_key
from pipeline.sweep.cost import assign_stacks, stacks_of, training_flops
from pipeline.sweep.engine import Engine
from pipeline.sweep.pool import StackPoolError
from pipeline.sweep.recorder import Recorder, finished_rows
from pipeline.sweep.spool import Spool
from pipeline.tracking import Run, Tracker, TrackingError, retry_tracking
from pipeline.tracking.claims import Claims
from pipeline.training.stack import EpochResult

PRECISION_OPTION = "precision: bfloat16 (of train: --precision bfloat16)"
SPOOL = ".spool"  # in the output folder
POLL_SECONDS, POLL_PAUSE = 2.0, 5  # between two looks at the cells of other workers; or so many times a look's length
Value = TypeVar("Value")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProgressListener:
    """Callbacks for a display of a sweep's progress, silent by default."""

    on_start: Callable[[Sequence[Cell], Sequence[Cell]], None] = lambda todo, done: None
    on_epoch: Callable[[EpochResult], None] = lambda step: None  # called from any thread
    on_cell: Callable[[Row], None] = lambda row: None  # with the row of a cell that finished


@dataclass(frozen=True)
class SweepContext:
    """What all cells of a sweep are trained with."""

    name: str  # of the grid
    data: Dataset
    vectors_uri: str  # where the data came from, for the record
    tracker: Tracker
    accelerator: Accelerator
    output: Path  # folder of the results, and of the spool
    params: dict[str, object]  # the command's options, for the parent run
    sweep_id: str | None = None  # of a sweep to continue; by default it follows from the cells and the data
    resume: bool = True  # use finished cells instead of training them again
    shard: Worker = field(default_factory=Worker)  # the part of the cells that this command trains
    listener: ProgressListener = field(default_factory=ProgressListener)


@dataclass(frozen=True)
class Complete:
    """A sweep whose cells are all finished, which this worker concludes: rows in the order of the cells."""

    sweep_id: str
    rows: list[Row]
    parent: Run  # still open


@dataclass(frozen=True)
class Incomplete:
    """A sweep of which this shard is done, and which another worker concludes or has concluded."""

    sweep_id: str
    finished: int  # cells
    cells: int  # in all


@contextlib.contextmanager
def run_sweep(cells: Sequence[Cell], context: SweepContext) -> Iterator[Complete | Incomplete | None]:
    """Train a shard's cells and track them, and keep the sweep's runs open while the body concludes it.

    Any number of workers may train one sweep: processes of ``accelerate launch``, shards, or the same command twice.
    Until the context ends, other workers see that this one is at work. An interruption or an error, also of the body,
    closes the runs of this worker.

    Args:
        cells: all cells of the sweep, as `prepare` returns them.
        context: what they are trained with.

    Yields:
        The rows of a complete sweep, or how far an incomplete one is; None in processes other than the main one.

    Raises:
        InputError: other workers train the same cells and data with another version of the results.
        WorkError: MLflow stayed away, and finished cells lie in the spool; or a worker on another kind of device began
            the sweep at the same moment.
    """
    data, tracker, accelerator, resume = context.data, context.tracker, context.accelerator, context.resume
    # The id does not depend on the kind of device that a worker has.
    open_keys = [cell_key(cell, data.vectors.identity, "auto") for cell in cells]
    sweep_id = broadcast_from_main(_sweep_id(context, open_keys))
    precision = broadcast_from_main(retry_tracking(lambda: _precision(tracker, sweep_id, accelerator.device)))
    keys = {cell: cell_key(cell, data.vectors.identity, precision) for cell in cells}
    rows, gone = retry_tracking(lambda: finished_rows(tracker, set(keys.values()), sweep_id)) if resume else ({}, [])
    if (again := {run.data.tags["cell_key"] for run in gone} - set(rows)) and accelerator.is_main_process:
        log.warning("%d finished cells are trained again: their students or rows are gone from MLflow", len(again))
    if context.shard.index and broadcast_from_main(
        len(rows) == len(cells) and retry_tracking(lambda: tracker.has_results(sweep_id, len(cells)))
    ):  # of many shards that find all cells finished, only the first concludes again
        yield Incomplete(sweep_id, len(cells), len(cells)) if accelerator.is_main_process else None
        return
    version, work = str(RESULTS_VERSION), work_key(cells, data.vectors.identity)
    claims = Claims(tracker, sweep_id, version, gone)
    check_version = functools.partial(_check_version, claims, work, accelerator, resume and len(rows) < len(cells))
    check_version()
    flops = functools.partial(training_flops, data=data)
    own = [cell for stack in assign_stacks(cells, context.shard.count, flops)[context.shard.index] for cell in stack]
    todo = [cell for cell in own if keys[cell] not in rows]
    context.listener.on_start(todo, [cell for cell in cells if keys[cell] in rows])
    is_precision_open = open_keys != list(keys.values())  # the keys of such cells depend on the precision
    if is_precision_open and todo and (advice := bfloat16_hint(PRECISION_OPTION, precision, accelerator.device)):
        log.info(advice)
    spool = Spool(context.output / SPOOL)
    tags = {"teacher": data.vectors.teacher, "extraction_key": data.vectors.extraction_key, "results_version": version}
    recorder = Recorder(claims, data, spool, keys, dict(tags))

    def on_epoch(step: EpochResult) -> None:
        recorder.note_epoch(step)
        context.listener.on_epoch(step)

    with Engine(data, accelerator.device, keys, spool, on_epoch, precision) as engine:
        engine.add_stacks(assign_stacks(todo, accelerator.num_processes, flops)[accelerator.process_index], resume)
        engine.start_early()  # while other workers are looked for
        tags |= {"grid": context.name, "vectors_sha256": data.vectors.sha256, "work_key": work, "precision": precision}
        parent = _open_parent(claims, accelerator, context.name, tags)
        with _closing(claims, parent, engine), claims.below(parent):
            recorded = broadcast_from_main(retry_tracking(lambda: parent.tags.get("precision", precision)))
            if is_precision_open and recorded != precision:
                raise WorkError(
                    f"sweep {sweep_id}: a worker on another kind of device began it at the same moment, and recorded "
                    f"the precision {recorded}; start this worker again, and it will keep to that"
                )
            check_version()  # again, now that others see this worker: those that begin at once see no other before
            if accelerator.is_main_process:
                _log_inputs(parent, context)
            _train(engine, recorder, todo, rows, context)
            if not accelerator.is_main_process:
                yield None
                return
            rows |= recorder.rows_of_others([cell for cell in cells if keys[cell] not in rows])
            if len(rows) < len(keys):
                if not claims.has_live_peers():
                    parent.mark_scheduled()
                yield Incomplete(sweep_id, len(rows), len(cells))
                return
            yield Complete(sweep_id, [rows[keys[cell]] for cell in cells], parent)
            parent.end("FINISHED")
            spool.clear(keys.values())


def broadcast_from_main(value: Value) -> Value:
    """The main process's value, in all processes of ``accelerate launch``."""
    values: list[Value] = broadcast_object_list([value])
    return values[0]


def _sweep_id(context: SweepContext, keys: Sequence[str]) -> str:
    """The sweep's id; without ``resume`` a new one at each time."""
    plain = re.sub(r"[^\w.-]+", "-", context.name)  # because ids stand in queries
    sweep_id = context.sweep_id or f"{plain}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:8]}"
    return sweep_id if context.resume else f"{sweep_id}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def _precision(tracker: Tracker, sweep_id: str, device: torch.device) -> str:
    """The precision of cells that leave it open: as the sweep's first worker recorded it, or that of the device."""
    own = training_precision(device)
    parent = tracker.find_sweep(sweep_id)
    recorded = own if parent is None else str(parent.data.tags.get("precision", own))
    if recorded != own:
        log.info("sweep %s: precision %s, as its first worker recorded it", sweep_id, recorded)
    return recorded


def _check_version(claims: Claims, work: str, accelerator: Accelerator, is_needed: bool) -> None:
    """Refuse to train what other workers train at this moment with another results version."""
    found = claims.find_other_version(work) if is_needed and accelerator.is_main_process else None
    if found := broadcast_from_main(found):
        sweep_id, host, version = found
        raise InputError(
            f"sweep {sweep_id}: {host} is at the same cells and data with results version {version}, and this worker "
            f"has {claims.version}; give all workers one image or checkout (in Kubernetes pin the image's tag), or "
            "wait until that sweep has ended"
        )


def _open_parent(claims: Claims, accelerator: Accelerator, name: str, tags: dict[str, str]) -> Run:
    """The parent run, found or made by the main process, the same in all processes."""
    found = claims.open_parent(name, tags) if accelerator.is_main_process else None
    run_id = broadcast_from_main(found.id if found else "")
    return found or Run(claims.tracker.client, run_id, claims.tracker.experiment_id)


def _log_inputs(parent: Run, context: SweepContext) -> None:
    """Log the command's options and the vectors in the parent run."""
    vectors = context.data.vectors
    profile = json.dumps({"concepts": len(vectors.concepts), "layers": list(vectors.layers)})
    dataset = (f"vectors {vectors.teacher}", vectors.sha256, context.vectors_uri, profile, "training")
    retry_tracking(lambda: parent.log_params(context.params))
    retry_tracking(lambda: parent.log_dataset(*dataset))


@contextlib.contextmanager
def _closing(claims: Claims, parent: Run, engine: Engine) -> Iterator[None]:
    """Close the runs when work is cut short: KILLED on an interruption, FAILED on any other error."""

    def close(status: str) -> None:
        engine.pool.ask_to_stop()  # jobs save their state while the runs are closed
        claims.withdraw()  # before others are looked for: of workers that leave together, the last finds no other
        with contextlib.suppress(*TrackingError):
            claims.close_unfinished(status)
        with contextlib.suppress(*TrackingError):
            if not claims.has_live_peers():
                parent.end(status)
        engine.pool.stop()

    try:
        with close_on_interrupt(functools.partial(close, "KILLED")):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # After another WorkError nothing can be closed: MLflow is away, and the next worker finds the runs abandoned.
        if isinstance(error, StackPoolError) or not isinstance(error, WorkError):
            close("FAILED")
        raise


def _train(engine: Engine, recorder: Recorder, todo: list[Cell], rows: dict[str, Row], context: SweepContext) -> None:
    """Train until all of a shard's cells are finished, here or by another worker; add their rows to ``rows``."""
    keys, on_cell = recorder.keys, context.listener.on_cell
    while todo:
        for trained in engine.train(recorder.claim, recorder.flush):
            if row := recorder.upload(trained["cell_key"], trained):
                rows[row["cell_key"]] = row
                on_cell(row)
        # Other workers hold the rest, until they finish it or die.
        begin = time.monotonic()
        found = recorder.rows_of_others([cell for cell in todo if keys[cell] not in rows])
        rows |= found
        for row in found.values():
            on_cell(row)
        todo = [cell for cell in todo if keys[cell] not in rows]
        if todo and not found:
            time.sleep(max(POLL_SECONDS, POLL_PAUSE * (time.monotonic() - begin)))
        engine.add_stacks(stacks_of(todo), context.resume)
