"""The kinds of student: the options that each reads, how it starts or is solved, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.dataset import Dataset, Subset
from pipeline.settings import Cell
from pipeline.training import mlp, transformer
from pipeline.training.closed_form import KERNEL, LANDMARKS, RIDGE, ClosedForm, apply_kernel, apply_linear, fit_ridge
from pipeline.training.mlp import Parameters

TRAINING_OPTIONS = (
    "objective", "epochs", "seed", "batch_size", "learning_rate", "weight_decay", "dropout", "temperature", "patience",
    "precision", "token_dropout", "noise", "mixup", "curriculum", "pace", "evaluations",
)  # fmt: skip
DATA_OPTIONS = ("student", "concepts", "layer", "targets", "split")


class Size(NamedTuple):
    """The number of weights and biases, and the operations of one prediction without the teacher's blocks."""

    weights: int
    flops: float


@dataclass(frozen=True)
class StudentKind:
    """One kind of student."""

    apply: Callable[..., Tensor]  # parameters [S, ...], inputs [S, B, features] and dropout masks to [S, B, d_model]
    reads: tuple[str, ...]  # the options of a cell that it reads
    size: Callable[[Cell, Dataset], Size]
    closed_form: ClosedForm | None = None
    start: Callable[[Cell, Subset, torch.Generator], Parameters] | None = None  # random, without the member axis
    dropout_sites: int = 0  # places of a layer where hidden units are dropped

    def canonical(self, cell: Cell) -> Cell:
        """The cell with the defaults for the options that the student does not read, so that equal work is one cell."""
        return Cell(**{item.name: getattr(cell, item.name) for item in fields(Cell) if item.name in self.reads})


def _linear_size(cell: Cell, data: Dataset) -> Size:
    weights = data.feature_count(cell) * data.vectors.d_model
    return Size(weights, 2.0 * weights)


def _kernel_size(cell: Cell, data: Dataset) -> Size:
    feature_count, d_model = data.feature_count(cell), data.vectors.d_model
    support = min(cell.concepts, LANDMARKS)
    weights = support * (feature_count + d_model) + feature_count * d_model + 1
    return Size(weights, 2.0 * weights)


def _mlp_size(cell: Cell, data: Dataset) -> Size:
    feature_count, d_model, hidden = data.feature_count(cell), data.vectors.d_model, cell.hidden_dim
    maps = (feature_count + cell.layers * hidden + d_model) * hidden + cell.skip * feature_count * d_model
    return Size(maps + (cell.layers + 1) * hidden + d_model, 2.0 * maps)


def _transformer_size(cell: Cell, data: Dataset) -> Size:
    d_model, hidden, tokens = data.vectors.d_model, cell.hidden_dim, data.max_tokens
    per_token, answer = d_model * hidden + cell.layers * 8 * hidden**2, hidden * d_model
    attention = cell.layers * 2 * tokens**2 * hidden
    weights = per_token + answer + (tokens + cell.layers * 2) * hidden + d_model
    return Size(weights, 2.0 * (tokens * per_token + attention + answer))


def _start_mlp(cell: Cell, subset: Subset, generator: torch.Generator) -> Parameters:
    feature_count, d_model = subset.train.inputs.shape[1], subset.train.targets.shape[1]
    parameters = mlp.init(feature_count, d_model, cell.hidden_dim, cell.layers, generator)
    if cell.skip:
        parameters["skip.weight"] = fit_ridge(subset).parameters["weight"].clone()
        parameters["out.weight"].zero_()
    return parameters


def _start_transformer(cell: Cell, subset: Subset, generator: torch.Generator) -> Parameters:
    tokens, d_model = subset.features.max_tokens, subset.train.targets.shape[1]
    width = subset.train.inputs.shape[1] // tokens
    return transformer.init(tokens, width, d_model, cell.hidden_dim, cell.layers, generator)


CLOSED_FORM = (*DATA_OPTIONS, "inputs")
KINDS = {
    "mlp": StudentKind(
        mlp.apply, (*DATA_OPTIONS, *TRAINING_OPTIONS, "inputs", "hidden_dim", "layers", "skip"), _mlp_size,
        start=_start_mlp, dropout_sites=mlp.DROPOUT_SITES,
    ),
    "transformer": StudentKind(
        transformer.apply, (*DATA_OPTIONS, *TRAINING_OPTIONS, "hidden_dim", "layers"), _transformer_size,
        start=_start_transformer, dropout_sites=transformer.DROPOUT_SITES,
    ),
    "ridge": StudentKind(apply_linear, CLOSED_FORM, _linear_size, RIDGE),
    "kernel": StudentKind(apply_kernel, CLOSED_FORM, _kernel_size, KERNEL),
    "truncated": StudentKind(apply_linear, (*CLOSED_FORM, "blocks"), _linear_size, RIDGE),
}  # fmt: skip
