"""The kinds of student as the trainer sees them: what each reads, how it starts or is solved, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.data.dataset import Dataset, Subset
from pipeline.settings import Cell
from pipeline.training import kernel, mlp, ridge, transformer

Parameters = dict[str, Tensor]
DESCENT = (
    "objective", "epochs", "seed", "batch_size", "learning_rate", "weight_decay", "dropout", "temperature", "patience",
    "precision", "token_dropout", "noise", "mixup", "curriculum", "pace", "evaluations",
)  # fmt: skip
DATA = ("student", "concepts", "layer", "targets", "split")


@dataclass(frozen=True)
class Kind:
    """One kind of student.

    Attributes:
        apply: parameters ``[S, ...]``, inputs ``[S, B, features]`` and what is dropped to ``[S, B, d_model]``.
        reads: the options of a cell that it reads; the others do not multiply its cells.
        weights: its number of weights and biases.
        flops: floating-point operations of one prediction, the teacher's blocks apart.
        solve: the closed form, or None.
        start: parameters before the first step, without the member axis, or None.
        sites: places of a layer where hidden units are dropped.
    """

    apply: Callable[..., Tensor]
    reads: tuple[str, ...]
    weights: Callable[[Cell, Dataset], int]
    flops: Callable[[Cell, Dataset], float]
    solve: Callable[[Subset], ridge.Fit] | None = None
    start: Callable[[Cell, Subset, torch.Generator], Parameters] | None = None
    sites: int = 0

    def canonical(self, cell: Cell) -> Cell:
        """The cell with all that the student does not read at the defaults, so that equal work is one cell."""
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
        parameters["skip.weight"] = ridge.fit(subset).parameters["weight"].clone()
        parameters["out.weight"].zero_()
    return parameters


def _start_transformer(cell: Cell, subset: Subset, generator: torch.Generator) -> Parameters:
    tokens = subset.features.max_tokens
    d_model = subset.train.targets.shape[-1]
    width = subset.train.inputs.shape[-1] // tokens
    return transformer.init(tokens, width, d_model, cell.hidden_dim, cell.layers, generator)


def _closed(
    apply: Callable[..., Tensor],
    solve: Callable[[Subset], ridge.Fit],
    reads: tuple[str, ...],
    weights: Callable[[Cell, Dataset], int],
) -> Kind:
    """A student in closed form, which multiplies once with each of its weights."""
    return Kind(apply, (*DATA, "inputs", *reads), weights, lambda cell, data: 2.0 * weights(cell, data), solve=solve)


KINDS = {
    "mlp": Kind(
        mlp.apply,
        (*DATA, *DESCENT, "inputs", "hidden_dim", "layers", "skip"),
        _mlp_weights,
        _mlp_flops,
        start=_start_mlp,
        sites=mlp.SITES,
    ),
    "transformer": Kind(
        transformer.apply,
        (*DATA, *DESCENT, "hidden_dim", "layers"),
        _transformer_weights,
        _transformer_flops,
        start=_start_transformer,
        sites=transformer.SITES,
    ),
    "ridge": _closed(ridge.apply, ridge.fit, (), _linear_weights),
    "kernel": _closed(kernel.apply, kernel.fit, (), _kernel_weights),
    "truncated": _closed(ridge.apply, ridge.fit, ("blocks",), _linear_weights),
}
