"""The kinds of student: the options that each reads, how it starts or is solved, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.data.dataset import Dataset, Subset
from pipeline.settings import Cell
from pipeline.training import closed_form, mlp, transformer
from pipeline.training.mlp import Parameters

TRAINING_OPTIONS = (
    "objective", "epochs", "seed", "batch_size", "learning_rate", "weight_decay", "dropout", "temperature", "patience",
    "precision", "token_dropout", "noise", "mixup", "curriculum", "pace", "evaluations",
)  # fmt: skip
DATA_OPTIONS = ("student", "concepts", "layer", "targets", "split")


@dataclass(frozen=True)
class StudentKind:
    """One kind of student.

    Attributes:
        apply: parameters ``[S, ...]``, inputs ``[S, B, features]`` and dropout masks to ``[S, B, d_model]``.
        reads: the options of a cell that it reads.
        weights: number of weights and biases.
        flops: floating-point operations of one prediction, without the teacher's blocks.
        solve: the closed form, or None.
        start: random parameters without the member axis, or None for a closed form.
        dropout_sites: places of a layer where hidden units are dropped.
    """

    apply: Callable[..., Tensor]
    reads: tuple[str, ...]
    weights: Callable[[Cell, Dataset], int]
    flops: Callable[[Cell, Dataset], float]
    solve: Callable[[Subset], closed_form.Fit] | None = None
    start: Callable[[Cell, Subset, torch.Generator], Parameters] | None = None
    dropout_sites: int = 0

    def canonical(self, cell: Cell) -> Cell:
        """The cell with the defaults for the options that the student does not read, so that equal work is one cell."""
        return Cell(**{item.name: getattr(cell, item.name) for item in fields(Cell) if item.name in self.reads})


def _linear_weights(cell: Cell, data: Dataset) -> int:
    return data.feature_count(cell) * data.vectors.d_model


def _kernel_weights(cell: Cell, data: Dataset) -> int:
    feature_count, d_model = data.feature_count(cell), data.vectors.d_model
    return cell.concepts * (feature_count + d_model) + feature_count * d_model + 1


def _mlp_weights(cell: Cell, data: Dataset) -> int:
    feature_count, d_model, hidden = data.feature_count(cell), data.vectors.d_model, cell.hidden_dim
    skip = feature_count * d_model if cell.skip else 0
    return (feature_count + 1) * hidden + cell.layers * (hidden + 1) * hidden + (hidden + 1) * d_model + skip


def _mlp_flops(cell: Cell, data: Dataset) -> float:
    biases = (cell.layers + 1) * cell.hidden_dim + data.vectors.d_model
    return 2.0 * (_mlp_weights(cell, data) - biases)


def _transformer_weights(cell: Cell, data: Dataset) -> int:
    d_model, hidden = data.vectors.d_model, cell.hidden_dim
    block = 8 * hidden**2 + 2 * hidden
    return (d_model + data.max_tokens) * hidden + cell.layers * block + (hidden + 1) * d_model


def _transformer_flops(cell: Cell, data: Dataset) -> float:
    d_model, hidden = data.vectors.d_model, cell.hidden_dim
    token = d_model * hidden + cell.layers * 8 * hidden**2
    attention = cell.layers * 2 * data.max_tokens**2 * hidden
    return 2.0 * (data.max_tokens * token + attention + hidden * d_model)


def _start_mlp(cell: Cell, subset: Subset, generator: torch.Generator) -> Parameters:
    feature_count, d_model = subset.train.inputs.shape[-1], subset.train.targets.shape[-1]
    parameters = mlp.init(feature_count, d_model, cell.hidden_dim, cell.layers, generator)
    if cell.skip:
        parameters["skip.weight"] = closed_form.fit_ridge(subset).parameters["weight"].clone()
        parameters["out.weight"].zero_()
    return parameters


def _start_transformer(cell: Cell, subset: Subset, generator: torch.Generator) -> Parameters:
    tokens, d_model = subset.features.max_tokens, subset.train.targets.shape[-1]
    width = subset.train.inputs.shape[-1] // tokens
    return transformer.init(tokens, width, d_model, cell.hidden_dim, cell.layers, generator)


def _flops_of(weights: Callable[[Cell, Dataset], int]) -> Callable[[Cell, Dataset], float]:
    """Operations of a student that multiplies once with each of its weights."""
    return lambda cell, data: 2.0 * weights(cell, data)


CLOSED_FORM = (*DATA_OPTIONS, "inputs")
# Weights, operations and solution.
LINEAR = _linear_weights, _flops_of(_linear_weights), closed_form.fit_ridge
KERNEL = _kernel_weights, _flops_of(_kernel_weights), closed_form.fit_kernel
KINDS = {
    "mlp": StudentKind(
        mlp.apply, (*DATA_OPTIONS, *TRAINING_OPTIONS, "inputs", "hidden_dim", "layers", "skip"), _mlp_weights,
        _mlp_flops, start=_start_mlp, dropout_sites=mlp.DROPOUT_SITES,
    ),
    "transformer": StudentKind(
        transformer.apply, (*DATA_OPTIONS, *TRAINING_OPTIONS, "hidden_dim", "layers"), _transformer_weights,
        _transformer_flops, start=_start_transformer, dropout_sites=transformer.DROPOUT_SITES,
    ),
    "ridge": StudentKind(closed_form.apply_linear, CLOSED_FORM, *LINEAR),
    "kernel": StudentKind(closed_form.apply_kernel, CLOSED_FORM, *KERNEL),
    "truncated": StudentKind(closed_form.apply_linear, (*CLOSED_FORM, "blocks"), *LINEAR),
}  # fmt: skip
