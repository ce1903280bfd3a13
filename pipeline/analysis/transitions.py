"""Phase transitions: does a student, long after it has memorised its training concepts, begin to generalise?

"Grokking" (Power et al., 2022) is a validation curve that rises late and steeply, when the training loss has long been
low. A transition is dated here on the logarithm of the epochs, from the curves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MEMORISED = 0.1  # training loss, as a share of its first value
HALF_RISE = 0.5  # of the whole rise of the validation curve, within one doubling of the epochs
LEAST_RISE = 0.05  # of validation cosine; less is drift


@dataclass(frozen=True)
class Transition:
    """When a run memorises its training concepts, and how steeply validation rises afterwards.

    Attributes:
        memorised: the first epoch with a training loss of at most `MEMORISED` of its first value; None without one.
        steepest: the epoch at the end of the doubling of epochs in which validation rises most after that.
        rise: the rise of the validation cosine in that doubling.
        late: whether this is a transition: a rise of at least `LEAST_RISE` and of `HALF_RISE` of the whole rise.
    """

    memorised: int | None
    steepest: int | None
    rise: float
    late: bool


def detect(epochs: Sequence[int], train_loss: Sequence[float], val_cosine: Sequence[float]) -> Transition:
    """Find the steepest rise of validation after a run memorises its training concepts; one value per evaluation."""
    when, loss, score = np.array(epochs), np.array(train_loss), np.array(val_cosine)
    low = np.flatnonzero(loss <= MEMORISED * loss[0])
    if not len(low):
        return Transition(None, None, 0.0, late=False)
    memorised = int(when[low[0]])
    after = np.flatnonzero(when >= 2 * memorised)
    if not len(after):
        return Transition(memorised, None, 0.0, late=False)
    before = np.interp(np.log(when[after] / 2), np.log(when), score)  # half as many epochs earlier
    rises = score[after] - before
    best = int(rises.argmax())
    rise = float(rises[best])
    whole = float(score.max() - score[0])
    late = rise >= max(LEAST_RISE, HALF_RISE * whole)
    return Transition(memorised, int(when[after[best]]), rise, late)


def describe(cells: Sequence[dict[str, Any]]) -> str:
    """One sentence about the transitions of long runs."""
    curves = ("epoch", "train_loss", "val_cosine")
    found = {row["name"]: detect(*(row["curves"][key] for key in curves)) for row in cells}
    if late := {name: one for name, one in found.items() if one.late}:
        listed = ", ".join(f"{name} at epoch {one.steepest} (+{one.rise:.3f})" for name, one in late.items())
        return f"Phase transition in {len(late)} of {len(found)} runs: {listed}."
    memorised = sum(one.memorised is not None for one in found.values())
    steepest = max(found.items(), key=lambda item: item[1].rise)
    return (
        f"No phase transition in {len(found)} runs: {memorised} memorise their training concepts, and none generalises "
        f"late. The steepest rise of validation within a doubling of the epochs after that is "
        f"{steepest[1].rise:+.3f} ({steepest[0]})."
    )
