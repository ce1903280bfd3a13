"""Scores of several sets of vectors on one task, and the share of the teacher's score that each retains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.benchmarks.tasks import Floats, Task

SAMPLES = 1000  # of the bootstrap over items
NUMBERS = 1 << 24  # weights held at once
ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Measured:
    """Scores with 95 % intervals over items, and the share of the teacher's that they are, likewise."""

    score: float  # mean over seeds, as the share
    score_low: float
    score_high: float
    retained: float | None  # None where the teacher itself does no better than chance
    retained_low: float | None
    retained_high: float | None
    scores: list[float]  # of each seed
    shares: list[float | None]

    def row(self, name: str) -> dict[str, Any]:
        """As entries of a row, by the name of the benchmark."""
        return {f"{name}_{key}": value for key, value in vars(self).items()}


def measure(task: Task, teacher: Floats, subjects: Mapping[str, Sequence[Floats]]) -> dict[str, Measured]:
    """Score vectors on a task, with percentile bootstrap intervals over its items.

    Args:
        task: with ``P`` phrases.
        teacher: the teacher's vectors, ``[P, d_model]``, centred.
        subjects: by name, the vectors of each seed, ``[P, width]``, centred; the scores of seeds are averaged.

    Returns:
        The scores by name.
    """
    items = len(task.item_phrases)
    own, all_items = task.answers(teacher), np.ones((1, items))
    skill, skills = (np.concatenate(_each(task.skill, own, weights)) for weights in ([all_items], _samples(items)))
    is_above_chance = np.quantile(skills, ENDS[0]) > 0
    measured = {}
    for name, seeds in subjects.items():
        answers = [task.answers(vectors) for vectors in seeds]
        scores = [float(task.score(one, all_items)[0]) for one in answers]
        draws, shares = (
            np.mean([np.concatenate(_each(how, one, _samples(items))) for one in answers], axis=0)
            for how in (task.score, task.skill)
        )
        low, high = _ends(draws, float(np.mean(scores)))
        found = Measured(float(np.mean(scores)), low, high, None, None, None, scores, [None] * len(seeds))
        if is_above_chance:
            of_seeds = [float((task.skill(one, all_items) / skill)[0]) for one in answers]
            low, high = _ends(shares / skills, float(np.mean(of_seeds)))
            found = replace(found, retained=float(np.mean(of_seeds)), retained_low=low, retained_high=high)
            found = replace(found, shares=list(of_seeds))
        measured[name] = found
    return measured


def _ends(draws: Floats, value: float) -> tuple[float, float]:
    """The 95 % interval of a value, by bootstrap draws without their bias: purity is higher where items repeat."""
    low, high = np.quantile(draws - draws.mean(), ENDS)
    return float(value + low), float(value + high)


def _each(how: Callable[[Floats, Floats], Floats], answers: Floats, weights: Iterable[Floats]) -> list[Floats]:
    return [how(answers, some) for some in weights]


def _samples(items: int) -> Iterator[Floats]:
    """The count of each item in each bootstrap sample, the same for all subjects: ``[S, items]``, some at once."""
    draw, step = np.random.default_rng(0), max(1, NUMBERS // items)
    for start in range(0, SAMPLES, step):
        yield draw.multinomial(items, np.full(items, 1 / items), min(step, SAMPLES - start)).astype(np.float64)
