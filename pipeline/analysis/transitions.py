"""Phase transitions: does a student, long after it has memorised its training concepts, begin to generalise?

"Grokking" (Power et al., 2022) is a validation curve that rises late and steeply, when the training loss has long been
low. A transition is dated here on the logarithm of the epochs, from the curves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MEMORISED = 0.1  # training loss, as a share of its first value
HALF_RISE = 0.5  # of the whole rise of the validation curve, within one doubling of the epochs
LEAST_RISE = 0.05  # of validation cosine; less is drift


class Transition(NamedTuple):
    """When a run memorises its training concepts, and how steeply validation rises afterwards."""

    memorised: int | None = None  # the first epoch with a training loss of at most `MEMORISED` of its first value
    steepest: int | None = None  # the end of the doubling of epochs in which validation rises most after that
    rise: float = 0.0  # of the validation cosine in that doubling
    late: bool = False  # a rise of at least `LEAST_RISE` and of `HALF_RISE` of the whole rise, which is a transition


def detect(epochs: Sequence[int], train_loss: Sequence[float], val_cosine: Sequence[float]) -> Transition:
    """Find the steepest rise of validation after a run memorises its training concepts; one value per evaluation."""
    when, loss, score = np.array(epochs), np.array(train_loss), np.array(val_cosine)
    low = np.flatnonzero(loss <= MEMORISED * loss[0])
    if not len(low):
        return Transition()
    memorised = int(when[low[0]])
    after = np.flatnonzero(when >= 2 * memorised)
    if not len(after):
        return Transition(memorised)
    before = np.interp(np.log(when[after] / 2), np.log(when), score)  # half as many epochs earlier
    rises = score[after] - before
    rise, whole = float(rises.max()), float(score.max() - score[0])
    late = rise >= max(LEAST_RISE, HALF_RISE * whole)
    return Transition(memorised, int(when[after[rises.argmax()]]), rise, late)


def describe(cells: Sequence[dict[str, Any]]) -> str:
    """One sentence about the transitions of long runs."""
    curves = ("epoch", "train_loss", "val_cosine")
    found = {row["name"]: detect(*(row["curves"][key] for key in curves)) for row in cells}
    if late := {name: one for name, one in found.items() if one.late}:
        listed = ", ".join(f"{name} at epoch {one.steepest} (+{one.rise:.3f})" for name, one in late.items())
        return f"Phase transition in {len(late)} of {len(found)} runs: {listed}."
    memorised = sum(one.memorised is not None for one in found.values())
    name, steepest = max(found.items(), key=lambda item: item[1].rise)
    return (
        f"No phase transition in {len(found)} runs: {memorised} memorise their training concepts, and none generalises "
        f"late. The steepest rise of validation within a doubling of the epochs after that is {steepest.rise:+.3f} "
        f"({name})."
    )
