"""What training minimises: pure functions from a stack's predictions to one loss a member.

``S`` members, ``B`` concepts a batch; ``weights`` is 0 for the rows that pad a last, shorter batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pipeline.metrics import cosines

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def cosine(predicted: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """1 - cosine, averaged over the batch: ``[S, B, d_model]`` twice and ``[S, B]`` to ``[S]``."""
    return _average(1 - cosines(predicted, truth), weights)


def mse(predicted: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Squared error over the vector's dimensions, averaged over the batch, in units of the target's variance."""
    return _average((predicted - truth).square().mean(-1), weights)


def _average(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum(-1) / weights.sum(-1)


OBJECTIVES: dict[str, Objective] = {"cosine": cosine, "mse": mse}
