"""The cells of one worker trained: stacks through the pool, the most expensive first, finished cells to the spool."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from pipeline.analysis.results import rounded
from pipeline.analysis.rows import Row
from pipeline.data.dataset import Dataset
from pipeline.metrics import by_category
from pipeline.settings import Cell
from pipeline.sweep.cost import assign_stacks, flops_of_prediction, split_by_batch, split_evenly, training_flops
from pipeline.sweep.pool import JobHandle, StackPool, max_parallel_stacks
from pipeline.sweep.spool import Spool
from pipeline.training.export import checkpoint
from pipeline.training.stack import EpochResult, Snapshot
from pipeline.training.trainer import Checkpointing, TrainedStudent, train_stack

Claim = Callable[[list[Cell]], list[Cell]]  # returns those of some cells that this worker may train


@dataclass(frozen=True)
class Task:
    """Cells to train together, from a snapshot of their stack where there is one, or one that is finished already."""

    cells: list[Cell]
    snapshot: Snapshot | None = None
    row: Row | None = None  # of a finished cell in the spool


@dataclass
class Engine:
    """Trains cells; a context, whose end stops the stacks that still train and saves their snapshots."""

    data: Dataset
    device: torch.device
    keys: Mapping[Cell, str]
    spool: Spool  # where finished cells and the snapshots of stopped stacks go
    on_epoch: Callable[[EpochResult], None] = lambda step: None  # called, from any thread, after each epoch of a cell
    default_precision: str | None = None  # of cells that leave it open; by default, that of the kind of device

    def __post_init__(self) -> None:
        self.pool: StackPool[Row] = StackPool(max_parallel_stacks(self.device), self.device, self.on_epoch)
        self._waiting: deque[list[Task]] = deque()  # each item is claimed together
        self._started_early: list[tuple[Task, JobHandle]] = []
        self._lost: set[Cell] = set()  # to other workers

    def __enter__(self) -> Engine:
        self.pool.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.__exit__(*error)

    def add_stacks(self, stacks: Sequence[list[Cell]], resume: bool = True) -> None:
        """Add stacks of cells to train, which continue from what the spool holds of them unless ``resume`` is false."""
        cells = [cell for stack in stacks for cell in stack]
        found: list[Task] = []
        if resume:
            rows = {cell: row for cell in cells if (row := self.spool.row(self.keys[cell]))}
            rest = [cell for cell in cells if cell not in rows]
            found = [Task([cell], row=row) for cell, row in rows.items()]
            found += [Task(own, snapshot) for own, snapshot in self.spool.load_snapshots(self.keys, rest)]
        known = {cell for task in found for cell in task.cells}
        new = [rest for stack in stacks if (rest := [cell for cell in stack if cell not in known])]
        flops = {cell: training_flops(cell, self.data) for stack in new for cell in stack}
        if new and self.device.type == "cpu":
            # No stack is so expensive that the other cores would wait for it.
            of_lanes = assign_stacks(list(flops), self.pool.size, flops.__getitem__)
            new = [part for stacks in of_lanes for stack in stacks for part in split_by_batch(stack, flops)]
        new.sort(key=lambda stack: -sum(flops[cell] for cell in stack))
        groups = [[task] for task in [*found, *map(Task, new)]]
        if new and self.device.type == "cpu":  # the last stack must not occupy one core while the others are idle
            # One part more than lanes, so that the first free lane takes it.
            groups[-1] = [Task(part) for part in split_evenly(new[-1], self.pool.size + 1, flops)]
        self._waiting.extend(groups)

    def start_early(self) -> None:
        """Start the first stacks before they are claimed; `train` stops those that other workers have claimed."""
        while self._waiting and len(self._started_early) < self.pool.size:
            self._started_early += [(task, self._start(task)) for task in self._waiting.popleft()]

    def train(self, claim: Claim = lambda cells: cells, meanwhile: Callable[[], None] = lambda: None) -> Iterator[Row]:
        """Train all cells that this worker may claim, with a call about every second; yields rows as cells finish."""
        self._claim_started(claim)
        ahead = 1
        batch: list[Task] = []
        with ThreadPoolExecutor(1, "claims") as claims:  # a claim takes its time, and rows must not wait for it
            while self._waiting or batch or self.pool.open_jobs:
                # Two more than lanes, so that no lane waits for a claim; more where that is too slow.
                if self._waiting and not batch and self.pool.open_jobs <= self.pool.size + 1:
                    ahead = ahead if self.pool.open_jobs >= self.pool.size else 2 * ahead
                    groups = [self._waiting.popleft() for _ in range(min(ahead, len(self._waiting)))]
                    batch = [task for group in groups for task in group]
                    claimed = claims.submit(claim, [cell for task in batch for cell in task.cells])
                if batch and claimed.done():
                    won = set(claimed.result())
                    for task in batch:
                        self._start_won(task, won)
                    batch = []
                elif (row := self.pool.next_result(0.1 if batch else 1.0)) is not None:
                    yield row
                meanwhile()

    def _claim_started(self, claim: Claim) -> None:
        cells = [cell for task, _ in self._started_early for cell in task.cells]
        won = set(claim(cells)) if cells else set()
        for task, job in self._started_early:
            if lost := set(task.cells) - won:
                job.cancel()
                self._lost |= lost
                self._remove(lost)
                self._start_won(task, won)
        self._started_early = []

    def _start_won(self, task: Task, won: set[Cell]) -> None:
        """Start a task with those of its cells that this worker has claimed."""
        if own := [cell for cell in task.cells if cell in won]:
            self._start(replace(task, cells=own))

    def _remove(self, lost: set[Cell]) -> None:
        """Remove the results of cells that other workers have claimed."""
        for cell in lost:
            self.spool.remove_own_cell(self.keys[cell])

    def _start(self, task: Task) -> JobHandle:
        for cell in task.cells:
            self.data.subset(cell)  # read once here, for all processes that are forked later

        def on_end(job: JobHandle) -> None:
            if job.is_cancelled:  # it may have finished cells before it stopped
                self._remove(self._lost & set(task.cells))

        return self.pool.start(lambda job: self._train(task, job), on_end)

    def _train(self, task: Task, job: JobHandle) -> Iterator[Row]:
        if task.row is not None:
            epochs, scores = task.row["curves"]["epoch"], task.row["curves"]["val_cosine"]
            losses = task.row["curves"].get("train_loss", [None] * len(scores))
            for epoch, score, loss in zip(epochs, scores, losses, strict=True):
                job.report(EpochResult(task.cells[0], epoch, score, loss))
            yield task.row
            return

        def save(snapshot: Snapshot) -> None:
            if not job.is_cancelled:
                self.spool.save_snapshot(snapshot, self.keys, self.keys[task.cells[0]])

        checkpointing = Checkpointing(task.snapshot, save, lambda: job.should_stop() or job.is_cancelled)
        subsets = [self.data.subset(cell) for cell in task.cells]
        trained = train_stack(task.cells, subsets, self.device, job.report, checkpointing, self.default_precision)
        for student in trained:
            yield self._row(student)
        if not checkpointing.pause():
            self.spool.remove_snapshots({self.keys[cell] for cell in task.cells})

    def _row(self, trained: TrainedStudent) -> Row:
        """The cell's row of the results file; the cell goes to the spool."""
        cell, key = trained.cell, self.keys[trained.cell]
        subset = self.data.subset(cell)
        categories = [self.data.vectors.categories[place] for place in subset.test.rows]
        row = {
            "name": self.data.omit_default(cell).name,
            **asdict(cell),
            "parameters": trained.number_of_parameters,
            "flops": flops_of_prediction(cell, self.data),
            "dtype": trained.dtype,
            **trained.metrics,
            "best_epoch": trained.best_epoch,
            "train_seconds": trained.train_seconds,
            "finished": f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}",
            "cell_key": key,
            "test_cosines": rounded(trained.test_cosines),
            "test_cosine_by_category": by_category(trained.test_cosines, categories),
            "curves": trained.curves,
        }
        self.spool.save_cell(key, row, checkpoint(cell, trained.parameters, subset, self.data, trained.metrics))
        return row
