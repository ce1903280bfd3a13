"""Scores of several sets of vectors on one task, and the share of the teacher's score that each retains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    answers = {name: [task.answers(vectors) for vectors in seeds] for name, seeds in subjects.items()}
    has_chance = type(task).skill is not type(task).score  # else one computation serves both
    skills: list[Floats] = []  # of the teacher, [S] each
    draws: dict[str, list[tuple[Floats, Floats]]] = {name: [] for name in subjects}  # scores and skills, [S] each
    for weights in _samples(items):
        skills.append(task.skill(own, weights))
        for name, seeds in answers.items():
            score = np.mean([task.score(one, weights) for one in seeds], axis=0)
            skill = np.mean([task.skill(one, weights) for one in seeds], axis=0) if has_chance else score
            draws[name].append((score, skill))
    of_all, of_teacher = task.skill(own, all_items), np.concatenate(skills)
    is_above_chance = np.quantile(of_teacher, ENDS[0]) > 0
    measured = {}
    for name, seeds in answers.items():
        scores = [float(task.score(one, all_items)[0]) for one in seeds]
        low, high = _ends(np.concatenate([score for score, _ in draws[name]]), float(np.mean(scores)))
        found = Measured(float(np.mean(scores)), low, high, None, None, None, scores, [None] * len(seeds))
        if is_above_chance:
            of_seeds = [float((task.skill(one, all_items) / of_all)[0]) for one in seeds]
            shares = np.concatenate([share for _, share in draws[name]]) / of_teacher
            low, high = _ends(shares, float(np.mean(of_seeds)))
            found = replace(found, retained=float(np.mean(of_seeds)), retained_low=low, retained_high=high)
            found = replace(found, shares=list(of_seeds))
        measured[name] = found
    return measured


def _ends(draws: Floats, value: float) -> tuple[float, float]:
    """The 95 % interval of a value, by bootstrap draws without their bias: purity is higher where items repeat."""
    low, high = np.quantile(draws - draws.mean(), ENDS)
    return float(value + low), float(value + high)


def _samples(items: int) -> Iterator[Floats]:
    """The count of each item in each bootstrap sample, ``[S, items]``, some samples at once."""
    draw, step = np.random.default_rng(0), max(1, NUMBERS // items)
    for start in range(0, SAMPLES, step):
        yield draw.multinomial(items, np.full(items, 1 / items), min(step, SAMPLES - start)).astype(np.float64)
