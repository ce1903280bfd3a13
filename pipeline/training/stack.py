"""A stack of students of one shape: stacked parameters, moments and data, and one optimiser step for all members.

With precision bfloat16 the matrix products, their inputs and their outputs are bfloat16; weights, moments, losses and
metrics of the finished student are float32 (Micikevicius et al., 2018, "Mixed precision training", without loss
scaling).

``S`` members, ``B`` concepts a batch, ``N`` training and ``V`` validation concepts, ``F`` features, ``D`` d_model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.data.dataset import Subset
from pipeline.metrics import cosines
from pipeline.settings import Cell
from pipeline.training.batches import Batches, steps_of_epoch
from pipeline.training.kinds import KINDS
from pipeline.training.objectives import objective_of
from pipeline.training.regularisation import Dropout, mix_with_next, mixup_weights

PER_DOUBLING = 8  # log-spaced evaluations per doubling of the epochs
WARM_UP = 0.05  # share of a member's steps
HISTORY = ("epoch", "best_epoch", "epochs", "losses", "scores", "seconds")  # fields of a member in a snapshot
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EpochResult:
    """Measurements of one member after an epoch (from 1)."""

    cell: Cell
    epoch: int
    val_cosine: float
    train_loss: float | None = None


Progress = Callable[[EpochResult], None]


@dataclass(frozen=True)
class Snapshot:
    """The state of a stack between two steps, complete enough to resume its training."""

    step: int  # steps taken
    members: list[dict[str, Any]]  # cell and `HISTORY` of each, plain values
    tensors: dict[str, Tensor]  # parameters, moments and best parameters, the member axis first
    generators: dict[int, Tensor]  # states of dropout, by seed


def precision_of_cell(cell: Cell, automatic: str) -> str:
    """The type of a cell's matrix products: float64 for closed forms, ``automatic`` where the cell says auto."""
    if KINDS[cell.student].closed_form:
        return "float64"
    return automatic if cell.precision == "auto" else cell.precision


@dataclass
class Member:
    """One student of a stack; ``best`` holds its parameters at the best epoch so far."""

    cell: Cell
    subset: Subset
    steps_per_epoch: int
    best: dict[str, Tensor]
    epoch: int = 0
    best_epoch: int = 0
    epochs: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Steps of all its epochs."""
        return self.cell.epochs * self.steps_per_epoch

    @property
    def is_done(self) -> bool:
        """Whether all epochs are over, or its patience is."""
        patience = self.cell.patience
        return self.epoch == self.cell.epochs or (patience is not None and self.epoch - self.best_epoch >= patience)

    @property
    def is_evaluated(self) -> bool:
        """Whether this epoch ends with a validation: each one, or `PER_DOUBLING` per doubling of the epochs."""
        if self.cell.evaluations == "every" or self.epoch in (1, self.cell.epochs):
            return True
        return int(PER_DOUBLING * math.log2(self.epoch)) > int(PER_DOUBLING * math.log2(self.epoch - 1))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps))
        return self.cell.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def start_member(cell: Cell, subset: Subset) -> Member:
    """A member before its first step."""
    start = KINDS[cell.student].start
    assert start is not None
    parameters = start(cell, subset, torch.Generator().manual_seed(cell.seed))
    return Member(cell, subset, steps_of_epoch(len(subset.train.rows), cell.batch_size), parameters)


class Stack:
    """Members of one `stack_key` with their data, on the device; ``automatic`` is the precision of auto cells."""

    def __init__(self, members: list[Member], device: torch.device, automatic: str) -> None:
        cells, subsets = [member.cell for member in members], [member.subset for member in members]
        cell, kind = cells[0], KINDS[cells[0].student]
        self.members = members
        self.dtype = PRECISIONS[precision_of_cell(cell, automatic)]
        self.batches = Batches(list(zip(cells, subsets, strict=True)), self.dtype, device)
        self.apply, self.objective = kind.apply, objective_of(cell.objective, cell.temperature)
        self.mixup = cell.mixup
        for member in members:
            member.best = {name: value.to(device) for name, value in member.best.items()}
        # [S, rows, columns] each
        self.parameters = {name: torch.stack([member.best[name] for member in members]) for name in members[0].best}
        self.moments = [{name: torch.zeros_like(value) for name, value in self.parameters.items()} for _ in range(2)]
        data = {
            "val_inputs": torch.stack([subset.val.inputs.to(self.dtype) for subset in subsets]),  # [S, V, F]
            "val_targets": torch.stack([subset.val.targets for subset in subsets]),  # [S, V, D]
            "losses": torch.zeros(len(members)),  # [S] summed since the last evaluation
            "mix": mixup_weights(cells, [member.steps for member in members]),  # [S, steps] or [S, 0]
        }
        self.data = {name: value.to(device) for name, value in data.items()}
        self.count = torch.zeros((), device=device)
        sites = kind.dropout_sites * cell.layers
        self.dropout = Dropout(cells, subsets[0].train.inputs.shape[1], sites, self.dtype, device)
        self._prepare()

    def _prepare(self) -> None:
        """Make the views and copies that all steps use, to save operations in each step."""
        is_short = self.dtype != torch.float32
        # Leaves of the graph: the parameters themselves in float32, copies in bfloat16.
        self.leaves = {
            name: (value.to(self.dtype) if is_short else value.detach()).requires_grad_()
            for name, value in self.parameters.items()
        }
        # float32 copies of bfloat16 gradients.
        self.gradients = [torch.empty_like(value) for value in self.parameters.values()] if is_short else []
        self.views = [
            tuple([value[row] for value in tensors.values()] for tensors in (self.parameters, *self.moments))
            for row in range(len(self.members))
        ]

    def _update_leaves(self) -> None:
        """Copy the parameters into their bfloat16 leaves."""
        if self.dtype != torch.float32:
            with torch.no_grad():
                torch._foreach_copy_(list(self.leaves.values()), list(self.parameters.values()))

    def train(self, step: int) -> None:
        """One AdamW step of every member (Loshchilov and Hutter, 2019)."""
        inputs, targets, weights = self.batches[step]
        masks = self.dropout.draw(self.batches.size)
        inputs = self.dropout.add_noise(inputs)
        if self.mixup:
            inputs, targets = (
                mix_with_next(values, self.data["mix"][:, step], weights > 0) for values in (inputs, targets)
            )
        answer = self.apply(self.leaves, inputs, masks)  # [S, B, D]
        loss = self.objective(answer.float(), targets, weights)  # [S]
        # Members share no parameter, so their losses may be summed.
        gradients = list(torch.autograd.grad(loss.sum(), list(self.leaves.values())))
        self.data["losses"] += loss.detach()
        if self.gradients:
            torch._foreach_copy_(self.gradients, gradients)
        self._update(self.gradients or gradients, step)
        self._update_leaves()

    def _update(self, gradients: Sequence[Tensor], step: int) -> None:
        """Apply AdamW, in one fused kernel for the members that share learning rate and weight decay."""
        groups: dict[tuple[float, float], list[int]] = {}
        for row, member in enumerate(self.members):
            groups.setdefault((member.learning_rate(step), member.cell.weight_decay), []).append(row)
        of_member = list(zip(*(value.unbind() for value in gradients), strict=True))
        self.count.fill_(step + 1)
        for (learning_rate, weight_decay), rows in groups.items():
            parameters, first, second = ([one for row in rows for one in self.views[row][part]] for part in range(3))
            own = [gradient for row in rows for gradient in of_member[row]]
            torch._fused_adamw_(  # the kernel of torch.optim.AdamW(fused=True), here on views of the stack
                parameters, own, first, second, [], [self.count] * len(parameters), amsgrad=False, lr=learning_rate,
                beta1=0.9, beta2=0.999, weight_decay=weight_decay, eps=1e-8, maximize=False,
            )  # fmt: skip

    @torch.no_grad()
    def validate(self, rows: slice, progress: Progress) -> None:
        """Measure some members at the end of an epoch, and keep the parameters that are the best so far."""
        own = {name: value[rows] for name, value in self.parameters.items()}
        leaves = {name: value[rows] for name, value in self.leaves.items()}
        answer = self.apply(leaves, self.data["val_inputs"][rows]).float()  # [members, V, D]
        scores = cosines(answer, self.data["val_targets"][rows]).mean(-1).tolist()
        losses = self.data["losses"][rows].tolist()
        self.data["losses"][rows] = 0.0
        for place, (member, score) in enumerate(zip(self.members[rows], scores, strict=True)):
            since = member.epoch - (member.epochs[-1] if member.epochs else 0)
            member.losses.append(losses[place] / (since * member.steps_per_epoch))
            member.epochs.append(member.epoch)
            if score > max(member.scores, default=-math.inf):
                member.best_epoch = member.epoch
                for name, value in own.items():
                    member.best[name].copy_(value[place])
            member.scores.append(score)
            progress(EpochResult(member.cell, member.epoch, score, member.losses[-1]))

    def snapshot(self, step: int) -> Snapshot:
        """The state after ``step`` steps."""
        tensors = {
            f"{part}.{name}": value.to("cpu", copy=True)
            for part, values in self._state().items()
            for name, value in values.items()
        }
        for name in self.parameters:
            tensors[f"best.{name}"] = torch.stack([member.best[name] for member in self.members]).cpu()
        tensors["losses"] = self.data["losses"].to("cpu", copy=True)
        members = [
            {"cell": member.cell} | {name: copy.copy(getattr(member, name)) for name in HISTORY}
            for member in self.members
        ]
        return Snapshot(step, members, tensors, self.dropout.states())

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {"parameters": self.parameters, "first": self.moments[0], "second": self.moments[1]}

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the state of a stack that had these members, and perhaps others."""
        place = {member["cell"]: row for row, member in enumerate(snapshot.members)}
        rows = [place[member.cell] for member in self.members]
        tensors = {name: value[rows] for name, value in snapshot.tensors.items()}
        for part, values in self._state().items():
            for name, value in values.items():
                value.copy_(tensors[f"{part}.{name}"])
        self.data["losses"].copy_(tensors["losses"])
        for row, member in enumerate(self.members):
            for name, value in member.best.items():
                value.copy_(tensors[f"best.{name}"][row])
            for name in HISTORY:
                setattr(member, name, copy.copy(snapshot.members[rows[row]][name]))
        self.dropout.restore(snapshot.generators)
        self._update_leaves()

    def release(self) -> list[Member]:
        """Remove the members that are done from the stack and return them."""
        done = [member for member in self.members if member.is_done]
        rest = [row for row, member in enumerate(self.members) if not member.is_done]
        # A slice keeps the other members in the same memory.
        keep: slice | list[int] = slice(len(rest)) if rest == list(range(len(rest))) else rest
        self.members = [self.members[row] for row in rest]
        for tensors in (self.parameters, *self.moments, self.data):
            for name in tensors:
                tensors[name] = tensors[name][keep]
        self.batches.keep(keep, [member.subset for member in self.members])
        self.dropout.keep([member.cell for member in self.members])
        self._prepare()
        return done
