"""Tables: honest intervals, and a verdict that claims no more than they show."""

from dataclasses import asdict

import numpy as np
import pytest

from pipeline.analysis.tables import configuration_table, verdict
from pipeline.settings import Cell


def rows(student, cosines_by_seed):
    return [
        asdict(Cell(student=student, concepts=100, layer=15, seed=seed))
        | {"name": f"c100-{student}-s{seed}", "parameters": 10, "val_cosine": float(np.mean(values)),
           "test_cosine": float(np.mean(values)), "test_cosines": list(values)}
        for seed, values in enumerate(cosines_by_seed)
    ]  # fmt: skip


def results(shift, noise=0.02):
    draw = np.random.default_rng(0)
    hard = draw.normal(0.5, 0.2, 200)  # some concepts are hard for everybody
    student = [hard + shift + draw.normal(0, noise, 200) for _ in range(3)]
    floor = {"concepts": 100, "layer": 15, "inputs": "activations", "targets": "first", "split": "concepts"}
    baselines = [
        floor | {"student": name, "test_cosines": list(own)} | dict.fromkeys(("val_cosine", "test_cosine"), own.mean())
        for name, own in (("mean", 0 * hard), ("nearest", hard - 0.3), ("ridge", hard))
    ]
    cells = rows("mlp", student)
    return {"cells": cells, "baselines": baselines, "best": cells[0]}


def test_intervals_are_over_concepts_and_seeds():
    head, table = configuration_table(results(0.0))
    [line] = [row for row in table if row[0] == "mlp"]
    low, high = (float(part) for part in line[head.index("95 % interval")].split(" to "))
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / np.sqrt(200), rel=0.2)
    [ridge] = [row for row in table if row[0].startswith("(ridge")]
    assert ridge[head.index("95 % interval")]


def test_a_student_beats_ridge_only_where_the_difference_is_clear():
    assert "It beats ridge" in verdict(results(0.01))  # far less than the concepts differ, but on the same concepts
    assert "It does not beat ridge" in verdict(results(-0.01))
    assert "cannot be told apart from ridge" in verdict(results(0.0))
    assert "cannot be told apart from ridge" in verdict(results(0.0003, noise=1e-4))  # clear, and of no weight
