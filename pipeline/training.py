"""The trainer: a stack of students of one shape, trained together.

Members of a stack have the same shapes and may differ in everything else (training concepts, seed, learning rate,
epochs). One batched matrix product a layer serves them all. A member takes its own steps through its own batches and
leaves the stack when it is done, so it ends up where it would have ended alone. A single student is a stack of one.

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
from pipeline.students import STUDENTS, mlp, ridge

WARM_UP = 0.05  # share of a member's steps


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
        metrics: ``val_*`` and ``test_*`` of `pipeline.metrics.NAMES`, at the best epoch.
        test_cosines: the centred cosine of each test concept, in the order of the subset's rows.
    """

    cell: Cell
    parameters: dict[str, Tensor]
    curves: dict[str, list[float]]
    best_epoch: int
    train_seconds: float
    number_of_parameters: int
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
    return cell.student, cell.hidden_dim, cell.layers, cell.objective, cell.batch_size, cell.dropout


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
    return Trained(cell, parameters, {"val_cosine": [val_cosine]}, 1, seconds, size), subset


@dataclass
class _Member:
    """One student of a stack, with views into the stacked parameters."""

    cell: Cell
    subset: Subset
    steps_per_epoch: int
    val_inputs: Tensor  # [1, N, F]
    val_targets: Tensor  # [N, D]
    best: dict[str, Tensor]
    best_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.cell.epochs * self.steps_per_epoch

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
    """Gradient descent on a stack; yields members as they finish, those with the fewest steps first."""
    device = accelerator.device
    batch_size = cells[0].batch_size
    # The longest first: who finishes is at the end, and the rest of the stack stays in place.
    pairs = sorted(zip(cells, subsets, strict=True), key=lambda pair: -_steps(*pair))
    stack = _Stack([_start(cell, subset, device) for cell, subset in pairs], device)
    apply, objective = STUDENTS[cells[0].student], OBJECTIVES[cells[0].objective]
    order = _batch_plan(stack.members, batch_size)  # [S, steps, B], -1 pads
    order = order.to(device)
    inputs = _pad([member.subset.train.inputs for member in stack.members], device)  # [S, N, F]
    targets = _pad([member.subset.train.targets / member.subset.scale for member in stack.members], device)  # [S, N, D]
    dropout = _Dropout(stack.members, inputs.shape[-1], device)
    losses = torch.zeros(len(stack.members), device=device)
    last = time.perf_counter()
    step = 0
    while stack.members:
        active = len(stack.members)
        rows = order[:active, step]  # [S, B]
        weights = (rows >= 0).to(inputs.dtype)
        pick = torch.arange(active, device=device)[:, None], rows.clamp(min=0)
        with accelerator.autocast():
            answer = apply(stack.parameters, inputs[pick], dropout.masks(batch_size))  # [S, B, D]
        loss = objective(answer.float(), targets[pick], weights)  # [S]
        stack.step(loss, step)
        losses[:active] += loss.detach()
        step += 1
        for number, member in enumerate(stack.members):
            if step % member.steps_per_epoch == 0:
                _end_epoch(stack, number, losses, apply, progress)
        now = time.perf_counter()
        for member in stack.members:
            member.seconds += (now - last) / active
        last = now
        while stack.members and stack.members[-1].steps == step:
            member = stack.members.pop()
            yield _leave(member), member.subset
        if len(stack.members) < active:
            stack.shrink()
            dropout.keep(stack.members)
            last = time.perf_counter()


def _steps(cell: Cell, subset: Subset) -> int:
    return cell.epochs * -(-len(subset.train.rows) // cell.batch_size)


def _start(cell: Cell, subset: Subset, device: torch.device) -> _Member:
    generator = torch.Generator().manual_seed(cell.seed)
    features, d_model = subset.train.inputs.shape[-1], subset.train.targets.shape[-1]
    parameters = mlp.init(features, d_model, cell.hidden_dim, cell.layers, generator)
    return _Member(
        cell,
        subset,
        steps_per_epoch=_steps(cell, subset) // cell.epochs,
        val_inputs=subset.val.inputs[None].to(device),
        val_targets=subset.val.targets.to(device),
        best=parameters,
    )


class _Stack:
    """Stacked parameters with one optimizer, in which each member is a parameter group of its own.

    The optimizer updates views of the stack, one fused kernel a member: members keep their own learning rate and
    weight decay, and the arithmetic is that of a student alone.
    """

    def __init__(self, members: list[_Member], device: torch.device) -> None:
        self.members = members
        names = members[0].best
        self.parameters = {
            name: torch.stack([member.best[name] for member in members]).to(device).requires_grad_() for name in names
        }  # [S, rows, columns]
        for value in self.parameters.values():
            value.grad = torch.zeros_like(value)
        groups = [
            {"params": [self._view(value, row) for value in self.parameters.values()], "weight_decay": w}
            for row, w in enumerate(member.cell.weight_decay for member in members)
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        for member in members:
            member.best = {name: value.to(device) for name, value in member.best.items()}

    @staticmethod
    def _view(value: Tensor, row: int) -> Tensor:
        view = value.detach()[row]
        assert value.grad is not None
        view.grad = value.grad[row]
        return view

    def step(self, loss: Tensor, step: int) -> None:
        """One AdamW step of every member. Members share no parameter, so their losses may be summed."""
        for value in self.parameters.values():
            assert value.grad is not None
            value.grad.zero_()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        for group, member in zip(self.optimizer.param_groups, self.members, strict=True):
            group["lr"] = member.learning_rate(step)
        self.optimizer.step()

    def shrink(self) -> None:
        """Drop the members that left from the end of the stack; the others go on in the same memory."""
        rest = len(self.members)
        for name, value in self.parameters.items():
            assert value.grad is not None
            smaller = value.detach()[:rest].requires_grad_()
            smaller.grad = value.grad[:rest]
            self.parameters[name] = smaller
        for group in self.optimizer.param_groups[rest:]:
            for view in group["params"]:
                self.optimizer.state.pop(view, None)
        del self.optimizer.param_groups[rest:]


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
    return pad_sequence(plans, batch_first=True, padding_value=-1)


def _pad(values: Sequence[Tensor], device: torch.device) -> Tensor:
    return pad_sequence(list(values), batch_first=True).to(device)


class _Dropout:
    """Dropout masks, drawn once a step and seed: members of one seed share them, as they would share them alone."""

    def __init__(self, members: Sequence[_Member], features: int, device: torch.device) -> None:
        cell = members[0].cell
        self.keep_share = 1 - cell.dropout
        self.widths = mlp.mask_widths(features, cell.hidden_dim, cell.layers)
        self.device = device
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
        if self.keep_share == 1:
            return None
        masks = []
        for width in self.widths:
            drawn = torch.stack(
                [
                    torch.empty(batch_size, width, device=self.device).bernoulli_(self.keep_share, generator=generator)
                    for generator in self.generators.values()
                ]
            ).div_(self.keep_share)  # [seeds, B, width]
            masks.append(drawn if self.members is None else drawn[self.members])
        return masks


@torch.no_grad()
def _end_epoch(
    stack: _Stack,
    number: int,
    losses: Tensor,
    apply: Callable[..., Tensor],
    progress: Callable[[Progress], None],
) -> None:
    """Validate one member and keep its parameters if they are the best so far."""
    member = stack.members[number]
    own = {name: value[number : number + 1] for name, value in stack.parameters.items()}
    score = cosines(apply(own, member.val_inputs)[0], member.val_targets).mean().item()
    member.losses.append(losses[number].item() / member.steps_per_epoch)
    losses[number] = 0.0
    if score > max(member.scores, default=-math.inf):
        member.best_epoch = len(member.scores) + 1
        for name, value in own.items():
            member.best[name].copy_(value[0])
    member.scores.append(score)
    progress(Progress(member.cell, len(member.scores), score))


def _leave(member: _Member) -> Trained:
    parameters = {name: value[None].cpu() for name, value in member.best.items()}
    size = sum(value.numel() for value in parameters.values())
    curves = {"train_loss": member.losses, "val_cosine": member.scores}
    return Trained(member.cell, parameters, curves, member.best_epoch, member.seconds, size)
