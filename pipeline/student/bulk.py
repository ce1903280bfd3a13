"""The student's float32 arithmetic in torch, whose lookups and products take less time for very many texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.student.forward import linear, mlp
from pipeline.student.lookup import POOLING, FloatArray, Table, TokenFeatures, TokenizedTexts

ROWS = 1 << 14  # of a table converted at once


def bulk_of(
    kind: str, features: TokenFeatures, parameters: Mapping[str, FloatArray]
) -> Callable[[TokenizedTexts, FloatArray, FloatArray], None] | None:
    """Make a function that writes a student's centred vectors plus a shift.

    Args:
        kind: of the student.
        features: its features.
        parameters: its weights.

    Returns:
        The function; None for students that it does not speed up.
    """
    if (
        kind not in ("mlp", "ridge")
        or not features.is_folded
        or not {part.pool for part in features.parts} <= {*POOLING}
    ):
        return None
    if kind == "mlp" and features.tables[features.parts[0].table].width != parameters["out.weight"].shape[0]:
        return None  # a linear skip in the tables
    tables = {name: _dense(table) for name, table in features.tables.items()}
    held = {name: torch.from_numpy(value) for name, value in parameters.items()}
    return partial(_answer, features, tables, partial(mlp, activation=F.gelu) if kind == "mlp" else linear, held)


def _dense(table: Table) -> Tensor:
    """A table in float32, ``[rows, width]``."""
    made = torch.empty(table.values.shape)
    for start in range(0, len(made), ROWS):
        made[start : start + ROWS] = torch.from_numpy(table[np.arange(start, min(start + ROWS, len(made)))])
    return made


@torch.inference_mode()
def _answer(
    features: TokenFeatures,
    tables: Mapping[str, Tensor],
    forward: Callable[..., Any],
    parameters: dict[str, Tensor],
    asked: TokenizedTexts,
    shift: FloatArray,
    out: FloatArray,
) -> None:
    torch.set_num_threads(1)  # of this thread: it has others beside it
    values, offsets = (torch.from_numpy(part) for part in (asked.tokens.values, asked.tokens.offsets))
    pooled = []
    for part in features.parts:
        table = tables[part.table]
        if part.pool == "mean":
            pooled.append(F.embedding_bag(values, table, offsets[:-1], mode="mean"))
        else:
            pooled.append(F.embedding(values[offsets[1:] - 1 if part.pool == "last" else offsets[:-1]], table))
    read = sum(pooled[1:], pooled[0]).sub_(torch.from_numpy(features.offset))
    torch.from_numpy(out).copy_(forward(parameters, read)).add_(torch.from_numpy(shift))
