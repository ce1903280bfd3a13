"""The trainer: a stack of students of one shape, trained together.

Members of a stack have the same shapes and may differ in everything else (training concepts, seed, learning rate,
epochs). One batched matrix product per layer computes all members. Each has its own batches and schedule and leaves the
stack when it is done, so its result is the same as in a stack of its own. A single student is a stack of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.dataset import Subset
from pipeline.data.examples import Examples
from pipeline.devices import training_precision
from pipeline.metrics import cosines, faithfulness
from pipeline.settings import Cell
from pipeline.training.kinds import KINDS
from pipeline.training.mlp import Parameters
from pipeline.training.objectives import is_scale_sensitive
from pipeline.training.stack import EpochResult, Progress, Snapshot, Stack, start_member

SAVE_SECONDS = 5.0  # least time between two snapshots: the work that a kill can lose
SAVE_SHARE = 0.02  # largest share of the time for snapshots
Pairs = list[tuple[Cell, Subset]]
Curves = dict[str, list[float]]
OUTPUT_WEIGHTS = {"weight", "out.weight", "out.bias", "skip.weight"}  # the maps whose sum is the prediction
# Cells that agree in these fields have the same shapes and the same arithmetic.
STACK_FIELDS = (
    "student", "hidden_dim", "layers", "inputs", "skip", "objective", "temperature", "batch_size", "dropout", "noise",
    "mixup", "precision", "split",
)  # fmt: skip


@dataclass
class TrainedStudent:
    """A student at its best epoch, the one (from 1) with the highest validation cosine."""

    cell: Cell
    parameters: Parameters  # with a member axis of 1, on the CPU, in the targets' own units
    curves: Curves  # `train_loss` and `val_cosine` at each evaluated `epoch` (one for a closed form)
    best_epoch: int
    train_seconds: float  # its share of the stack's wall time
    number_of_parameters: int
    dtype: str  # of the matrix products in training
    metrics: dict[str, float]  # val_* and test_* of `pipeline.metrics.NAMES`
    test_cosines: list[float]  # centred, of each test concept, in the order of the subset's rows


@dataclass(frozen=True)
class Checkpointing:
    """How a stack saves its state, stops and resumes."""

    start: Snapshot | None = None  # to resume from
    save: Callable[[Snapshot], None] = lambda snapshot: None  # called every `SAVE_SECONDS` or less often, and at a stop
    pause: Callable[[], bool] = lambda: False  # called between two steps; true stops the training


def stack_key(cell: Cell) -> tuple[object, ...]:
    """Cells with the same key have the same shapes and train in one stack."""
    if KINDS[cell.student].closed_form:
        return (cell.student,)
    return tuple(getattr(cell, name) for name in STACK_FIELDS)


def epochs(cell: Cell) -> int:
    """Number of `EpochResult` that a cell reports: one for a closed form."""
    return 1 if KINDS[cell.student].closed_form else cell.epochs


def train_stack(
    cells: Sequence[Cell],
    subsets: Sequence[Subset],
    device: torch.device,
    progress: Progress = lambda step: None,
    checkpointing: Checkpointing | None = None,
    automatic: str | None = None,
) -> Iterator[TrainedStudent]:
    """Train cells of one `stack_key`.

    Args:
        cells: the members.
        subsets: the training data of each, in the same order.
        device: where they train.
        progress: called after each member's epoch.
        checkpointing: how to save, stop and resume.
        automatic: the precision of cells whose precision is auto; by default, that of the kind of device.

    Returns:
        Each student when it is done; those that are not done at a stop are left out.
    """
    pairs, checkpointing = list(zip(cells, subsets, strict=True)), checkpointing or Checkpointing()
    if KINDS[cells[0].student].closed_form:
        return _solve(pairs, device, progress, checkpointing)
    return _descend(pairs, device, progress, checkpointing, automatic or training_precision(device))


def predict(student: str, parameters: Parameters, examples: Examples) -> Tensor:
    """A trained student's centred predictions for one part of the split, ``[N, d_model]``."""
    return KINDS[student].apply(parameters, examples.inputs[None])[0]


def _finish(
    cell: Cell, subset: Subset, parameters: Parameters, curves: Curves, best_epoch: int, seconds: float, dtype: str
) -> TrainedStudent:
    """Scale the output weights to the targets' units, and measure on validation and, only here, on test."""
    parameters = {name: value[None].clone().cpu() for name, value in parameters.items()}
    gain = subset.scale
    if not KINDS[cell.student].closed_form and not is_scale_sensitive(cell.objective):
        # A cosine does not determine the length of an answer; take that of the least squared error on validation.
        answer, truth = predict(cell.student, parameters, subset.val).double(), subset.val.targets.double()
        gain = ((answer * truth).sum() / answer.square().sum().clamp(min=1e-12)).item()
    for name in parameters.keys() & OUTPUT_WEIGHTS:
        parameters[name] *= gain
    metrics: dict[str, float] = {}
    for part, examples in (("val", subset.val), ("test", subset.test)):
        answer = predict(cell.student, parameters, examples)
        measured = faithfulness(answer, examples.targets, subset.mean)
        metrics |= {f"{part}_{name}": value for name, value in measured.items()}
    test_cosines = cosines(answer, examples.targets).tolist()  # of the last part, test
    size = sum(value.numel() for value in parameters.values())
    return TrainedStudent(cell, parameters, curves, best_epoch, seconds, size, dtype, metrics, test_cosines)


def _solve(
    pairs: Pairs, device: torch.device, progress: Progress, checkpointing: Checkpointing
) -> Iterator[TrainedStudent]:
    for cell, subset in pairs:
        if checkpointing.pause():
            return
        begin = time.perf_counter()
        closed_form = KINDS[cell.student].closed_form
        assert closed_form is not None
        fitted = closed_form.solve(subset, device)
        seconds = time.perf_counter() - begin
        progress(EpochResult(cell, 1, fitted.val_cosine))
        curves: Curves = {"epoch": [1], "val_cosine": [fitted.val_cosine]}
        yield _finish(cell, subset, fitted.parameters, curves, 1, seconds, "float64")


def _descend(
    pairs: Pairs, device: torch.device, progress: Progress, checkpointing: Checkpointing, automatic: str
) -> Iterator[TrainedStudent]:
    # The longest first: members that finish are then at the end, and the rest of the stack stays in place.
    stack = Stack(sorted((start_member(*pair) for pair in pairs), key=lambda member: -member.steps), device, automatic)
    step = _resume(stack, checkpointing.start, progress) if checkpointing.start else 0
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
        for rows in _slices([row for row in ended if stack.members[row].is_evaluated]):
            stack.validate(rows, progress)
        now = time.perf_counter()
        for member in stack.members:
            member.seconds += (now - last) / len(stack.members)
        last = now
        if any(stack.members[row].is_done for row in ended):
            for member in stack.release():
                curves: Curves = {"epoch": [*member.epochs], "train_loss": member.losses, "val_cosine": member.scores}
                dtype = str(stack.dtype).removeprefix("torch.")
                best = member.best, curves, member.best_epoch, member.seconds, dtype
                yield _finish(member.cell, member.subset, *best)
            last = time.perf_counter()


def _resume(stack: Stack, snapshot: Snapshot, progress: Progress) -> int:
    """Restore a stack and report its past epochs; the number of steps taken."""
    stack.restore(snapshot)
    for member in stack.members:
        for epoch, score, loss in zip(member.epochs, member.scores, member.losses, strict=True):
            progress(EpochResult(member.cell, epoch, score, loss))
    return snapshot.step


def _slices(numbers: Sequence[int]) -> list[slice]:
    """Ascending numbers as slices of consecutive ones."""
    found: list[slice] = []
    for number in numbers:
        begin = found.pop().start if found and found[-1].stop == number else number
        found.append(slice(begin, number + 1))
    return found
