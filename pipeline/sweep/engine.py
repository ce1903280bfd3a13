"""Cells into rows: stacks through lanes, the most expensive first, each finished cell on disk before anything else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from pipeline.data.dataset import Dataset
from pipeline.metrics import by_category
from pipeline.settings import Cell
from pipeline.sweep.cost import flops_of_prediction, parts_of, training_flops, with_little_padding
from pipeline.sweep.pool import Handle, StackPool, max_parallel_stacks
from pipeline.sweep.spool import Spool
from pipeline.training.export import checkpoint
from pipeline.training.stack import EpochResult, Snapshot
from pipeline.training.trainer import Checkpointing, TrainedStudent, train_stack

Row = dict[str, Any]
Take = Callable[[list[Cell]], list[Cell]]


class Engine:
    """Trains cells; a context, whose end stops what still trains and keeps its state.

    Args:
        data: the vectors.
        device: where to train.
        keys: the key of every cell.
        spool: where finished cells and the states of stopped stacks go; None keeps nothing.
        progress: called, from any thread, after each epoch of each cell.
        automatic: the precision of cells that leave it open; that of the device's kind by default.
    """

    def __init__(
        self,
        data: Dataset,
        device: torch.device,
        keys: Mapping[Cell, str],
        spool: Spool | None = None,
        progress: Callable[[EpochResult], None] = lambda step: None,
        automatic: str | None = None,
    ) -> None:
        self.data, self.device, self.keys, self.spool = data, device, keys, spool
        self.automatic = automatic
        self.pool: StackPool[Row] = StackPool(max_parallel_stacks(device), device, progress)
        self._waiting: deque[list[tuple[list[Cell], Snapshot | None]]] = deque()  # what is claimed together
        self._early: list[tuple[list[Cell], Snapshot | None, Handle]] = []
        self._lost: set[Cell] = set()
        self._resume = True

    def __enter__(self) -> Engine:
        self.pool.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.__exit__(*error)

    def add(self, stacks: Sequence[list[Cell]], resume: bool = True) -> None:
        """Cells to train, in stacks.

        Args:
            stacks: as `pipeline.sweep.cost` makes them.
            resume: go on from what the spool holds of them.
        """
        cells = [cell for stack in stacks for cell in stack]
        found: list[tuple[list[Cell], Snapshot | None]] = []
        if self.spool is not None and resume:
            finished = [cell for cell in cells if self.spool.row(self.keys[cell])]
            rest = [cell for cell in cells if cell not in finished]
            found = [([cell], None) for cell in finished]
            found += self.spool.unfinished(self.keys, rest)
        known = {cell for stack, _ in found for cell in stack}
        new = [rest for stack in stacks if (rest := [cell for cell in stack if cell not in known])]
        price = {cell: training_flops(cell, self.data) for stack in new for cell in stack}
        if self.device.type == "cpu":
            new = [part for stack in new for part in with_little_padding(stack, price)]
        new.sort(key=lambda stack: -sum(price[cell] for cell in stack))
        groups = [[(stack, snapshot)] for stack, snapshot in [*found, *((stack, None) for stack in new)]]
        if new and self.device.type == "cpu":  # the last one must not keep one core busy while the others have none
            # One part more than lanes, so that the first that is free takes it.
            groups[-1] = [(part, None) for part in parts_of(new[-1], self.pool.number + 1, price)]
        self._waiting.extend(groups)
        self._resume = resume

    def begin(self) -> None:
        """Start on the first stacks at once; `rows` stops those that turn out to be others'."""
        while self._waiting and len(self._early) < self.pool.number:
            for stack, snapshot in self._waiting.popleft():
                self._early.append((stack, snapshot, self._start(stack, snapshot)))

    def rows(self, take: Take = lambda cells: cells, meanwhile: Callable[[], None] = lambda: None) -> Iterator[Row]:
        """Train all that was added; the rows of the results file, as cells finish.

        Args:
            take: which of these cells to train after all.
            meanwhile: called about every second.
        """
        self._claim_early(take)
        ahead = 1
        batch: list[tuple[list[Cell], Snapshot | None]] = []
        with ThreadPoolExecutor(1, "claims") as claims:  # a claim takes its time, and rows must not wait for it
            while self._waiting or batch or self.pool.open:
                # Two more than there are lanes, so that none waits for a claim; more where that is too slow.
                if self._waiting and not batch and self.pool.open <= self.pool.number + 1:
                    ahead = ahead if self.pool.open >= self.pool.number else 2 * ahead
                    groups = [self._waiting.popleft() for _ in range(min(ahead, len(self._waiting)))]
                    batch = [part for group in groups for part in group]
                    claim = claims.submit(take, [cell for stack, _ in batch for cell in stack])
                if batch and claim.done():
                    won = set(claim.result())
                    for stack, snapshot in batch:
                        if own := [cell for cell in stack if cell in won]:
                            self._start(own, snapshot)
                    batch = []
                elif (row := self.pool.next(0.1 if batch else 1.0)) is not None:
                    yield row
                meanwhile()

    def _claim_early(self, take: Take) -> None:
        won = set(take([cell for stack, _, _ in self._early for cell in stack])) if self._early else set()
        for stack, snapshot, job in self._early:
            own = [cell for cell in stack if cell in won]
            if own != stack:
                job.cancel()
                self._drop([cell for cell in stack if cell not in won])
                if own:
                    self._start(own, snapshot)
        self._early = []

    def _drop(self, lost: list[Cell]) -> None:
        """Remove what was finished of cells that are others'."""
        self._lost.update(lost)
        if self.spool is not None:
            for cell in lost:
                self.spool.drop_own(self.keys[cell])

    def _start(self, stack: list[Cell], snapshot: Snapshot | None) -> Handle:
        for cell in stack:
            self.data.subset(cell)  # once here, for all processes forked later
        return self.pool.start(
            lambda job: self._train(stack, snapshot, job),
            # Again, because a job may have finished cells while it turned out that they are others'.
            ended=lambda job: self._drop([cell for cell in stack if job.cancelled and cell in self._lost]),
        )

    def _train(self, stack: list[Cell], snapshot: Snapshot | None, job: Handle) -> Iterator[Row]:
        if self.spool is not None and self._resume and (row := self.spool.row(self.keys[stack[0]])):
            epochs, scores = row["curves"]["epoch"], row["curves"]["val_cosine"]
            losses = row["curves"].get("train_loss", [None] * len(scores))
            for epoch, score, loss in zip(epochs, scores, losses, strict=True):
                job.tell(EpochResult(stack[0], epoch, score, loss))
            yield row
            return

        def save(state: Snapshot) -> None:
            if self.spool is not None and not job.cancelled:
                self.spool.keep(state, self.keys, self.keys[stack[0]])

        checkpointing = Checkpointing(snapshot, save, lambda: job.pause() or job.cancelled)
        subsets = [self.data.subset(cell) for cell in stack]
        for trained in train_stack(stack, subsets, self.device, job.tell, checkpointing, self.automatic):
            yield self._row(trained)
        if self.spool is not None and not checkpointing.pause():
            self.spool.forget({self.keys[cell] for cell in stack})

    def _row(self, trained: TrainedStudent) -> Row:
        """The cell's row of the results file; the cell goes to the spool."""
        cell, key, vectors = trained.cell, self.keys[trained.cell], self.data.vectors
        subset = self.data.subset(cell)
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
            "test_cosine_by_category": by_category(
                trained.test_cosines, [vectors.categories[place] for place in subset.test.rows]
            ),
            "curves": trained.curves,
        }
        if self.spool is not None:
            self.spool.add(key, row, checkpoint(cell, trained.parameters, subset, self.data, trained.metrics))
        return row


def rounded(values: Sequence[float]) -> list[float]:
    """Cosines for a results file: four digits are more than a concept's cosine is known to."""
    return [round(value, 4) for value in values]
