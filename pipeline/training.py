"""The trainer: a stack of students of one shape, trained together.

Members of a stack have the same shapes and may differ in everything else (training concepts, seed, learning rate,
epochs). One batched matrix product a layer serves them all. A member takes its own steps through its own batches and
leaves the stack when it is done, so it ends up where it would have ended alone. A single student is a stack of one.

In bfloat16 the matrix products, their inputs and their outputs are short; weights, moments, losses and the metrics of
the finished student are float32 (Micikevicius et al., 2018, "Mixed precision training"; no loss scaling is needed).

``S`` members, ``B`` concepts a batch, ``F`` features, ``D`` d_model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.features import Side, Subset
from pipeline.metrics import cosines, faithfulness
from pipeline.objectives import OBJECTIVES
from pipeline.options import Cell
from pipeline.processes import multiplies_faster
from pipeline.students import STUDENTS, mlp, ridge

WARM_UP = 0.05  # share of a member's steps
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Trained:
    """A student at its best epoch.

    Attributes:
        cell: its configuration.
        parameters: weights with a member axis of 1, on the CPU, in the targets' own units.
        curves: values by epoch of ``train_loss`` and ``val_cosine`` (closed-form students: one value).
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
class Progress:
    """One member after one of its epochs."""

    cell: Cell
    epoch: int
    val_cosine: float


def stack_key(cell: Cell) -> tuple[object, ...]:
    """Cells with the same key have the same shapes and train in one stack."""
    if cell.student == "ridge":
        return (cell.student,)
    return cell.student, cell.hidden_dim, cell.layers, cell.objective, cell.batch_size, cell.dropout, cell.precision


def precision_of(cell: Cell, device: torch.device) -> torch.dtype:
    """The type of the cell's matrix products on a device."""
    if cell.precision == "auto":
        return torch.bfloat16 if multiplies_faster(torch.bfloat16, device) else torch.float32
    return PRECISIONS[cell.precision]


def epochs(cell: Cell) -> int:
    """How many `Progress` steps the cell will report: closed-form students take one."""
    return 1 if cell.student == "ridge" else cell.epochs


def train_stack(
    cells: Sequence[Cell],
    subsets: Sequence[Subset],
    accelerator: Accelerator,
    progress: Callable[[Progress], None] = lambda step: None,
) -> Iterator[Trained]:
    """Train cells of one `stack_key` and yield each as it finishes.

    Args:
        cells: the members.
        subsets: the training data of each, in the same order.
        accelerator: gives the device and the precision of the matrix products.
        progress: called after each member's epoch.
    """
    if cells[0].student == "ridge":
        results: Iterator[tuple[Trained, Subset]] = (
            _solve_ridge(cell, subset) for cell, subset in zip(cells, subsets, strict=True)
        )
    else:
        results = _descend(cells, subsets, accelerator, progress)
    for trained, subset in results:
        _finish(trained, subset)
        if trained.cell.student == "ridge":
            progress(Progress(trained.cell, 1, trained.metrics["val_cosine"]))
        yield trained


def predict(student: str, parameters: dict[str, Tensor], side: Side) -> Tensor:
    """A trained student's centred answers for one side of the split, ``[N, d_model]``."""
    answer: Tensor = STUDENTS[student](parameters, side.inputs[None])[0]
    return answer


def _finish(trained: Trained, subset: Subset) -> None:
    """Scale the answers to the targets' units and measure once on validation and, here only, on test."""
    last = "weight" if trained.cell.student == "ridge" else "out.weight"
    gain = subset.scale
    if trained.cell.objective == "cosine" and trained.cell.student != "ridge":
        # The cosine leaves the length of an answer free; validation gives the one that minimises the squared error.
        answer = predict(trained.cell.student, trained.parameters, subset.val)
        gain = ((answer * subset.val.targets).sum() / answer.square().sum().clamp(min=1e-12)).item()
    for name in (last, "out.bias"):
        if name in trained.parameters:
            trained.parameters[name] *= gain
    for side_name, side in (("val", subset.val), ("test", subset.test)):
        answer = predict(trained.cell.student, trained.parameters, side)
        measured = faithfulness(answer, side.targets, subset.mean)
        trained.metrics |= {f"{side_name}_{name}": value for name, value in measured.items()}
    trained.test_cosines = cosines(answer, side.targets).tolist()  # of the loop's last side, test


def _solve_ridge(cell: Cell, subset: Subset) -> tuple[Trained, Subset]:
    start = time.perf_counter()
    parameters, _, val_cosine = ridge.fit(subset)
    seconds = time.perf_counter() - start
    size = sum(value.numel() for value in parameters.values())
    return Trained(cell, parameters, {"val_cosine": [val_cosine]}, 1, seconds, size, "float64"), subset


@dataclass
class _Member:
    """One student of a stack."""

    cell: Cell
    subset: Subset
    steps_per_epoch: int
    best: dict[str, Tensor]
    best_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.cell.epochs * self.steps_per_epoch

    @property
    def is_done(self) -> bool:
        """Whether it has had all its epochs, or enough of them without a better one."""
        patience = self.cell.patience
        idle = len(self.scores) - self.best_epoch
        return len(self.scores) == self.cell.epochs or (patience is not None and idle >= patience)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps))
        return self.cell.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def _descend(
    cells: Sequence[Cell],
    subsets: Sequence[Subset],
    accelerator: Accelerator,
    progress: Callable[[Progress], None],
) -> Iterator[tuple[Trained, Subset]]:
    """Gradient descent on a stack; yields members as they finish."""
    # The longest first: who finishes is mostly at the end, and the rest of the stack stays in place.
    pairs = sorted(zip(cells, subsets, strict=True), key=lambda pair: -_steps(*pair))
    stack = _Stack([_start(cell, subset) for cell, subset in pairs], accelerator.device)
    last = time.perf_counter()
    step = 0
    while stack.members:
        stack.train(step)
        step += 1
        ended = [row for row, member in enumerate(stack.members) if step % member.steps_per_epoch == 0]
        for rows in _runs(ended):
            stack.validate(rows, progress)
        now = time.perf_counter()
        for member in stack.members:
            member.seconds += (now - last) / len(stack.members)
        last = now
        if any(stack.members[row].is_done for row in ended):
            for member in stack.release():
                yield _leave(member, str(stack.dtype).removeprefix("torch.")), member.subset
            last = time.perf_counter()


def _runs(numbers: Sequence[int]) -> list[slice]:
    """Ascending numbers as slices of neighbours."""
    edges = [place for place in range(1, len(numbers)) if numbers[place] != numbers[place - 1] + 1]
    starts, ends = [0, *edges], [*edges, len(numbers)]
    return [slice(numbers[a], numbers[b - 1] + 1) for a, b in zip(starts, ends, strict=True)] if numbers else []


def _steps(cell: Cell, subset: Subset) -> int:
    return cell.epochs * -(-len(subset.train.rows) // cell.batch_size)


def _start(cell: Cell, subset: Subset) -> _Member:
    generator = torch.Generator().manual_seed(cell.seed)
    features, d_model = subset.train.inputs.shape[-1], subset.train.targets.shape[-1]
    parameters = mlp.init(features, d_model, cell.hidden_dim, cell.layers, generator)
    return _Member(cell, subset, steps_per_epoch=_steps(cell, subset) // cell.epochs, best=parameters)


class _Stack:
    """The members with all that they train on, stacked, on the device.

    Args:
        members: of one `stack_key`.
        device: where they train.
    """

    def __init__(self, members: list[_Member], device: torch.device) -> None:
        cell = members[0].cell
        self.members = members
        self.batch_size = cell.batch_size
        self.dtype = precision_of(cell, device)
        self.apply, self.objective = STUDENTS[cell.student], OBJECTIVES[cell.objective]
        # [S, rows, columns] each
        self.parameters = {
            name: torch.stack([member.best[name] for member in members]).to(device) for name in members[0].best
        }
        self.moments = [{name: torch.zeros_like(value) for name, value in self.parameters.items()} for _ in range(2)]
        self.data = {
            "order": _batch_plan(members, self.batch_size),  # [S, steps, B], -1 pads
            "inputs": _pad([member.subset.train.inputs.to(self.dtype) for member in members]),  # [S, N, F]
            "targets": _pad([member.subset.train.targets / member.subset.scale for member in members]),  # [S, N, D]
            "val_inputs": torch.stack([member.subset.val.inputs.to(self.dtype) for member in members]),  # [S, V, F]
            "val_targets": torch.stack([member.subset.val.targets for member in members]),  # [S, V, D]
            "losses": torch.zeros(len(members)),  # [S] summed over an epoch
        }
        self.data = {name: value.to(device) for name, value in self.data.items()}
        for member in members:
            member.best = {name: value.to(device) for name, value in member.best.items()}
        self.count = torch.zeros((), device=device)
        self.dropout = _Dropout(members, self.data["inputs"].shape[-1], self.dtype, device)

    def train(self, step: int) -> None:
        """One AdamW step of every member (Loshchilov and Hutter, 2019)."""
        rows = self.data["order"][:, step]  # [S, B]
        weights = (rows >= 0).float()
        pick = torch.arange(len(rows), device=rows.device)[:, None], rows.clamp(min=0)
        # Leaves of the graph: the parameters themselves in float32, copies in bfloat16.
        leaves = {name: value.detach().to(self.dtype).requires_grad_() for name, value in self.parameters.items()}
        answer = self.apply(leaves, self.data["inputs"][pick], self.dropout.masks(self.batch_size))  # [S, B, D]
        loss = self.objective(answer.float(), self.data["targets"][pick], weights)  # [S]
        # Members share no parameter, so their losses may be summed.
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        self.data["losses"] += loss.detach()
        self._update(dict(zip(leaves, gradients, strict=True)), step)

    def _update(self, gradients: dict[str, Tensor], step: int) -> None:
        """AdamW, one fused kernel for the members that share learning rate and weight decay."""
        gradients = {name: value.float() for name, value in gradients.items()}
        alike: dict[tuple[float, float], list[int]] = {}
        for row, member in enumerate(self.members):
            alike.setdefault((member.learning_rate(step), member.cell.weight_decay), []).append(row)
        for (learning_rate, weight_decay), rows in alike.items():
            first, second = ([m[name][row] for row in rows for name in gradients] for m in self.moments)
            parameters = [self.parameters[name][row] for row in rows for name in gradients]
            torch._fused_adamw_(  # the kernel of torch.optim.AdamW(fused=True), here on views of the stack
                parameters,
                [gradients[name][row] for row in rows for name in gradients],
                first,
                second,
                [],
                [self.count.fill_(step + 1)] * len(parameters),
                amsgrad=False,
                lr=learning_rate,
                beta1=0.9,
                beta2=0.999,
                weight_decay=weight_decay,
                eps=1e-8,
                maximize=False,
            )

    @torch.no_grad()
    def validate(self, rows: slice, progress: Callable[[Progress], None]) -> None:
        """End an epoch of some members: measure them, and keep their parameters where they are the best so far."""
        own = {name: value[rows] for name, value in self.parameters.items()}
        short = {name: value.to(self.dtype) for name, value in own.items()}
        answer = self.apply(short, self.data["val_inputs"][rows]).float()  # [members, V, D]
        scores = cosines(answer, self.data["val_targets"][rows]).mean(-1).tolist()
        losses = self.data["losses"][rows].tolist()
        self.data["losses"][rows] = 0.0
        for place, (member, score) in enumerate(zip(self.members[rows], scores, strict=True)):
            member.losses.append(losses[place] / member.steps_per_epoch)
            if score > max(member.scores, default=-math.inf):
                member.best_epoch = len(member.scores) + 1
                for name, value in own.items():
                    member.best[name].copy_(value[place])
            member.scores.append(score)
            progress(Progress(member.cell, len(member.scores), score))

    def release(self) -> list[_Member]:
        """Take the members that are done out of the stack; the others go on."""
        done = [member for member in self.members if member.is_done]
        rest = [row for row, member in enumerate(self.members) if not member.is_done]
        # Those at the end leave the others in the same memory.
        keep: slice | list[int] = slice(len(rest)) if rest == list(range(len(rest))) else rest
        self.members = [self.members[row] for row in rest]
        for tensors in (self.parameters, *self.moments, self.data):
            for name in tensors:
                tensors[name] = tensors[name][keep]
        self.dropout.keep(self.members)
        return done


def _batch_plan(members: Sequence[_Member], batch_size: int) -> Tensor:
    """Which training concepts each member sees at each of its steps, ``[S, steps, B]``; -1 pads.

    Every epoch is a new shuffle from the member's own seed.
    """
    plans = []
    for member in members:
        generator = torch.Generator().manual_seed(member.cell.seed)
        size = len(member.subset.train.rows)
        epochs = torch.full((member.cell.epochs, member.steps_per_epoch * batch_size), -1)
        for epoch in range(member.cell.epochs):
            epochs[epoch, :size] = torch.randperm(size, generator=generator)
        plans.append(epochs.view(member.steps, batch_size))
    return _pad(plans, -1)


def _pad(values: Sequence[Tensor], filler: float = 0.0) -> Tensor:
    return pad_sequence(list(values), batch_first=True, padding_value=filler)


class _Dropout:
    """Dropout masks, drawn once a step and seed: members of one seed share them, as they would share them alone.

    A mask is drawn as random bytes, eight at once, so a share is rounded to 1/256; the scale is exact for it.
    """

    def __init__(self, members: Sequence[_Member], features: int, dtype: torch.dtype, device: torch.device) -> None:
        cell = members[0].cell
        self.kept = round(256 * (1 - cell.dropout))  # of 256
        self.widths = mlp.mask_widths(features, cell.hidden_dim, cell.layers)
        self.dtype, self.device = dtype, device
        self.generators = {
            member.cell.seed: torch.Generator(device).manual_seed(member.cell.seed) for member in members
        }
        self.keep(members)

    def keep(self, members: Sequence[_Member]) -> None:
        """Draw for these members only from now on."""
        seeds = [member.cell.seed for member in members]
        self.generators = {seed: self.generators[seed] for seed in dict.fromkeys(seeds)}
        of_seed = {seed: number for number, seed in enumerate(self.generators)}
        self.members = None if len(of_seed) <= 1 else torch.tensor([of_seed[s] for s in seeds], device=self.device)

    def masks(self, batch_size: int) -> list[Tensor] | None:
        """One mask a width, ``[1 or S, B, width]``, 0 or 1 / share kept."""
        if self.kept == 256:
            return None
        size = batch_size * sum(self.widths)
        words = torch.empty(len(self.generators), -(-size // 8), dtype=torch.int64, device=self.device)
        for row, generator in zip(words, self.generators.values(), strict=True):
            row.random_(-(2**63), None, generator=generator)
        drawn = (words.view(torch.uint8)[:, :size] < self.kept).view(-1, batch_size, sum(self.widths))
        scaled = drawn.to(self.dtype).mul_(256 / self.kept)  # [seeds, B, all widths]
        masks = scaled if self.members is None else scaled[self.members]
        return list(torch.split(masks, self.widths, -1))


def _leave(member: _Member, dtype: str) -> Trained:
    parameters = {name: value[None].cpu() for name, value in member.best.items()}
    size = sum(value.numel() for value in parameters.values())
    curves = {"train_loss": member.losses, "val_cosine": member.scores}
    return Trained(member.cell, parameters, curves, member.best_epoch, member.seconds, size, dtype)
