"""Very many texts at once: a student's lookups and products in torch, in bfloat16 where that is faster here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.precision import multiplies_faster
from pipeline.reading import POOLS, Floats, Reading, Texts
from pipeline.students import KINDS

ROWS = 1 << 14  # of a table converted at once


def bulk_of(kind: str, reading: Reading, parameters: Mapping[str, Floats]) -> Callable[[Texts], Floats] | None:
    """What gives a student's centred vectors for texts, ``[n, d_model]``; None for students that it does not speed up.

    Args:
        kind: of the student.
        reading: how it reads.
        parameters: its weights.
    """
    if kind not in ("mlp", "ridge") or not {part.pool for part in reading.parts} <= set(POOLS):
        return None
    dtype = torch.bfloat16 if multiplies_faster(torch.bfloat16, torch.device("cpu")) else torch.float32
    tables = {name: _dense(reading, name, dtype) for name in {part.table for part in reading.parts}}
    width = next(iter(tables.values())).shape[1]
    if reading.is_folded and kind == "mlp" and width != parameters["out.weight"].shape[0]:
        return None  # a linear skip in the tables
    short = {name: torch.from_numpy(value)[None].to(dtype) for name, value in parameters.items()}
    return partial(_answer, reading, kind, tables, short, dtype)


def _dense(reading: Reading, name: str, dtype: torch.dtype) -> Tensor:
    """A table without its scales, ``[types, width]``."""
    table = reading.tables[name]
    made = torch.empty(table.values.shape, dtype=dtype)
    for start in range(0, len(made), ROWS):
        made[start : start + ROWS] = torch.from_numpy(table[np.arange(start, min(start + ROWS, len(made)))])
    return made


@torch.inference_mode()
def _answer(
    reading: Reading,
    kind: str,
    tables: dict[str, Tensor],
    parameters: dict[str, Tensor],
    dtype: torch.dtype,
    asked: Texts,
) -> Floats:
    values, offsets = (torch.from_numpy(part) for part in (asked.tokens.values, asked.tokens.offsets))
    pooled = []
    for part in reading.parts:
        table = tables[part.table]
        if part.pool == "mean":
            pooled.append(F.embedding_bag(values, table, offsets[:-1], mode="mean"))
        else:
            pooled.append(table[values[offsets[1:] - 1 if part.pool == "last" else offsets[:-1]]])
    if reading.is_folded:
        read = torch.stack(pooled).sum(0) if len(pooled) > 1 else pooled[0]
        read = read - torch.from_numpy(reading.offset).to(dtype)
        if kind == "ridge":
            return read.float().numpy()
    else:
        read = torch.cat(pooled, 1) - torch.from_numpy(reading.offset).to(dtype)
        read = read / torch.from_numpy(reading.scale).to(dtype)
    answer: Tensor = KINDS[kind].apply(parameters, read[None])[0]
    return answer.float().numpy()
