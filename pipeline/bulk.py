"""Very many texts at once: a student's lookups and products in torch, in bfloat16 where that is faster here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.precision import multiplies_faster
from pipeline.reading import POOLS, Floats, Reading, Table, Texts
from pipeline.students import KINDS

ROWS = 1 << 14  # of a table converted at once


def bulk_of(
    kind: str, reading: Reading, parameters: Mapping[str, Floats]
) -> Callable[[Texts, Floats, Floats], None] | None:
    """What writes a student's centred vectors for texts plus a shift; None for students that it does not speed up.

    Args:
        kind: of the student.
        reading: how it reads.
        parameters: its weights.
    """
    if kind not in ("mlp", "ridge") or not {part.pool for part in reading.parts} <= set(POOLS):
        return None
    dtype = torch.bfloat16 if multiplies_faster(torch.bfloat16, torch.device("cpu")) else torch.float32
    if not reading.is_folded:
        offsets = [reading.offset[columns] for columns in reading.columns]
        scales = [np.broadcast_to(reading.scale, reading.offset.shape)[columns] for columns in reading.columns]
        constant = np.zeros(1, np.float32)
    else:  # what all rows have in common goes into the bias once: 16 bits are for what tells them apart
        offsets = [_mean(reading.tables[part.table]) for part in reading.parts]
        scales = [np.ones(1, np.float32)] * len(offsets)
        constant = np.sum(offsets, axis=0) - reading.offset
    held = dict(parameters)
    if reading.is_folded and kind == "mlp":
        if reading.tables[reading.parts[0].table].width != parameters["out.weight"].shape[0]:
            return None  # a linear skip in the tables
        offsets[-1] = offsets[-1] - constant - held.pop("in.bias")[0]
        constant = np.zeros(1, np.float32)
    tables = [
        _dense(reading.tables[part.table], offset, scale, dtype)
        for part, offset, scale in zip(reading.parts, offsets, scales, strict=True)
    ]
    short = {name: torch.from_numpy(value)[None].to(dtype) for name, value in held.items()}
    apply = KINDS[kind].apply if short else None
    return partial(_answer, [part.pool for part in reading.parts], tables, reading.is_folded, apply, short, constant)


def _mean(table: Table) -> Floats:
    """The mean row."""
    total = np.zeros(table.width)
    for start in range(0, len(table.values), ROWS):
        total += table[np.arange(start, min(start + ROWS, len(table.values)))].sum(0)
    return (total / len(table.values)).astype(np.float32)


def _dense(table: Table, offset: Floats, scale: Floats, dtype: torch.dtype) -> Tensor:
    """A table as numbers of one type, less an offset and by a scale, ``[types, width]``."""
    made = torch.empty(table.values.shape, dtype=dtype)
    for start in range(0, len(made), ROWS):
        rows = table[np.arange(start, min(start + ROWS, len(made)))]
        made[start : start + ROWS] = torch.from_numpy((rows - offset) / scale)
    return made


@torch.inference_mode()
def _answer(
    pools: Sequence[str],
    tables: Sequence[Tensor],
    is_folded: bool,
    apply: Callable[..., Tensor] | None,
    parameters: dict[str, Tensor],
    constant: Floats,
    asked: Texts,
    shift: Floats,
    out: Floats,
) -> None:
    torch.set_num_threads(1)  # of this thread: it has others beside it
    values, offsets = (torch.from_numpy(part) for part in (asked.tokens.values, asked.tokens.offsets))
    pooled = []
    for pool, table in zip(pools, tables, strict=True):
        if pool == "mean":
            pooled.append(F.embedding_bag(values, table, offsets[:-1], mode="mean"))
        else:
            pooled.append(F.embedding(values[offsets[1:] - 1 if pool == "last" else offsets[:-1]], table))
    read = pooled[0] if is_folded else torch.cat(pooled, 1)
    for own in pooled[1:] if is_folded else []:
        read += own
    answer = read if apply is None else apply(parameters, read[None])[0]
    # In float32, for a mean is large; a sum of two types would take five times as long.
    torch.from_numpy(out).copy_(answer).add_(torch.from_numpy(shift + constant))
