"""The trainer: a stack of students of one shape, trained together.

Members of a stack have the same shapes and may differ in everything else (training concepts, seed, learning rate,
epochs). One batched matrix product a layer serves them all. A member takes its own steps through its own batches and
leaves the stack when it is done, so it ends up where it would have ended alone. A single student is a stack of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.dataset import Examples, Subset
from pipeline.devices import training_precision
from pipeline.metrics import cosines, faithfulness
from pipeline.settings import Cell
from pipeline.training.kinds import KINDS
from pipeline.training.objectives import keeps_length
from pipeline.training.stack import EpochResult, Member, Snapshot, Stack, start

SAVE_SECONDS = 5.0  # between two snapshots of a stack: what a kill can cost
SAVE_SHARE = 0.02  # of the time at the most is spent on snapshots
OUTPUT_WEIGHTS = ("weight", "out.weight", "out.bias", "skip.weight")  # the maps whose sum is a student's answer
# Cells that agree in these have the same shapes and the same arithmetic.
STACK_FIELDS = (
    "student", "hidden_dim", "layers", "inputs", "skip", "objective", "temperature", "batch_size", "dropout", "noise",
    "mixup", "precision", "split",
)  # fmt: skip


@dataclass
class TrainedStudent:
    """A student at its best epoch.

    Attributes:
        cell: its configuration.
        parameters: weights with a member axis of 1, on the CPU, in the targets' own units.
        curves: ``train_loss`` and ``val_cosine`` at each ``epoch`` (from 1) that was evaluated (closed-form students:
            one).
        best_epoch: the epoch (from 1) with the highest validation cosine.
        train_seconds: its share of the stack's wall time, by training steps.
        number_of_parameters: weights and biases.
        dtype: the type of the matrix products in training.
        metrics: ``val_*`` and ``test_*`` of `pipeline.metrics.NAMES`, at the best epoch.
        test_cosines: the centred cosine of each test concept, in the order of the subset's rows.
    """

    cell: Cell
    parameters: dict[str, Tensor]
    curves: dict[str, list[float]]
    best_epoch: int
    train_seconds: float
    number_of_parameters: int
    dtype: str
    metrics: dict[str, float] = field(default_factory=dict)
    test_cosines: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpointing:
    """How a stack is stopped, and what it leaves for the one that goes on.

    Attributes:
        start: where to go on.
        save: keeps a snapshot; called every `SAVE_SECONDS` or more seldom, and before a stop.
        pause: called between two steps; true asks to stop.
    """

    start: Snapshot | None = None
    save: Callable[[Snapshot], None] = lambda snapshot: None
    pause: Callable[[], bool] = lambda: False


def stack_key(cell: Cell) -> tuple[object, ...]:
    """Cells with the same key have the same shapes and train in one stack."""
    if KINDS[cell.student].solve:
        return (cell.student,)
    return tuple(getattr(cell, name) for name in STACK_FIELDS)


def epochs(cell: Cell) -> int:
    """How many `EpochResult` steps the cell will report: closed-form students take one."""
    return 1 if KINDS[cell.student].solve else cell.epochs


def train_stack(
    cells: Sequence[Cell],
    subsets: Sequence[Subset],
    device: torch.device,
    progress: Callable[[EpochResult], None] = lambda step: None,
    checkpointing: Checkpointing | None = None,
    automatic: str | None = None,
) -> Iterator[TrainedStudent]:
    """Train cells of one `stack_key` and yield each as it finishes; when asked to stop, yield no more.

    Args:
        cells: the members.
        subsets: the training data of each, in the same order.
        device: where they train.
        progress: called after each member's epoch.
        checkpointing: how to stop and go on.
        automatic: the precision of cells that leave it open; that of the device's kind by default.
    """
    pairs, checkpointing = list(zip(cells, subsets, strict=True)), checkpointing or Checkpointing()
    if KINDS[cells[0].student].solve:
        finished = _solve(pairs, progress, checkpointing)
    else:
        finished = _descend(pairs, device, progress, checkpointing, automatic or training_precision(device))
    for trained, subset in finished:
        _finish(trained, subset)
        yield trained


def predict(student: str, parameters: dict[str, Tensor], side: Examples) -> Tensor:
    """A trained student's centred answers for one side of the split, ``[N, d_model]``."""
    answer: Tensor = KINDS[student].apply(parameters, side.inputs[None])[0]
    return answer


def _finish(trained: TrainedStudent, subset: Subset) -> None:
    """Scale the answers to the targets' units and measure once on validation and, here only, on test."""
    gain = subset.scale
    if not KINDS[trained.cell.student].solve and not keeps_length(trained.cell.objective):
        # The cosine leaves the length of an answer free; validation gives the one that minimises the squared error.
        answer = predict(trained.cell.student, trained.parameters, subset.val)
        answer, truth = answer.double(), subset.val.targets.double()
        gain = ((answer * truth).sum() / answer.square().sum().clamp(min=1e-12)).item()
    for name in OUTPUT_WEIGHTS:
        if name in trained.parameters:
            trained.parameters[name] *= gain
    for side_name, side in (("val", subset.val), ("test", subset.test)):
        answer = predict(trained.cell.student, trained.parameters, side)
        measured = faithfulness(answer, side.targets, subset.mean)
        trained.metrics |= {f"{side_name}_{name}": value for name, value in measured.items()}
    trained.test_cosines = cosines(answer, side.targets).tolist()  # of the loop's last side, test


Pairs = list[tuple[Cell, Subset]]


def _solve(
    pairs: Pairs, progress: Callable[[EpochResult], None], checkpointing: Checkpointing
) -> Iterator[tuple[TrainedStudent, Subset]]:
    for cell, subset in pairs:
        if checkpointing.pause():
            return
        start = time.perf_counter()
        closed = KINDS[cell.student].solve
        assert closed is not None
        fitted = closed(subset)
        seconds = time.perf_counter() - start
        progress(EpochResult(cell, 1, fitted.val_cosine))
        parameters = {name: value[None].clone() for name, value in fitted.parameters.items()}
        size = sum(value.numel() for value in parameters.values())
        curves: dict[str, list[float]] = {"epoch": [1], "val_cosine": [fitted.val_cosine]}
        yield TrainedStudent(cell, parameters, curves, 1, seconds, size, "float64"), subset


def _descend(
    pairs: Pairs,
    device: torch.device,
    progress: Callable[[EpochResult], None],
    checkpointing: Checkpointing,
    automatic: str,
) -> Iterator[tuple[TrainedStudent, Subset]]:
    """Gradient descent on a stack; yields members as they finish."""
    # The longest first: who finishes is mostly at the end, and the rest of the stack stays in place.
    stack = Stack(sorted((start(*pair) for pair in pairs), key=lambda member: -member.steps), device, automatic)
    step = _go_on(stack, checkpointing.start, progress) if checkpointing.start else 0
    last = saved = time.perf_counter()
    wait = SAVE_SECONDS
    while stack.members:
        stopping = checkpointing.pause()
        if stopping or last - saved > wait:
            checkpointing.save(stack.snapshot(step))
            saved = time.perf_counter()
            wait = max(SAVE_SECONDS, (saved - last) / SAVE_SHARE)
        if stopping:
            return
        stack.train(step)
        step += 1
        ended = [row for row, member in enumerate(stack.members) if step % member.steps_per_epoch == 0]
        for row in ended:
            stack.members[row].epoch += 1
        for rows in _runs([row for row in ended if stack.members[row].is_evaluated]):
            stack.validate(rows, progress)
        now = time.perf_counter()
        for member in stack.members:
            member.seconds += (now - last) / len(stack.members)
        last = now
        if any(stack.members[row].is_done for row in ended):
            for member in stack.release():
                yield _leave(member, str(stack.dtype).removeprefix("torch.")), member.subset
            last = time.perf_counter()


def _go_on(stack: Stack, snapshot: Snapshot, progress: Callable[[EpochResult], None]) -> int:
    """Put a stack where another stopped, and tell of its epochs; the steps taken."""
    stack.restore(snapshot)
    for member in stack.members:
        for epoch, score, loss in zip(member.epochs, member.scores, member.losses, strict=True):
            progress(EpochResult(member.cell, epoch, score, loss))
    return snapshot.step


def _runs(numbers: Sequence[int]) -> list[slice]:
    """Ascending numbers as slices of neighbours."""
    edges = [place for place in range(1, len(numbers)) if numbers[place] != numbers[place - 1] + 1]
    starts, ends = [0, *edges], [*edges, len(numbers)]
    return [slice(numbers[a], numbers[b - 1] + 1) for a, b in zip(starts, ends, strict=True)] if numbers else []


def _leave(member: Member, dtype: str) -> TrainedStudent:
    parameters = {name: value[None].cpu() for name, value in member.best.items()}
    size = sum(value.numel() for value in parameters.values())
    curves: dict[str, list[float]] = {
        "epoch": list(member.epochs),
        "train_loss": member.losses,
        "val_cosine": member.scores,
    }
    return TrainedStudent(member.cell, parameters, curves, member.best_epoch, member.seconds, size, dtype)
