"""Scaling laws: known exponents come back from noisy data, and predictions keep their word."""

import numpy as np
import pytest

from pipeline import scaling
from pipeline.errors import InputError

TRUE = {"E": 0.15, "A": 3.0, "alpha": 0.45, "B": 20.0, "beta": 0.5}


def cosine(n, p):
    return 1 - (TRUE["E"] + TRUE["A"] * n ** -TRUE["alpha"] + TRUE["B"] * p ** -TRUE["beta"])


def cells(noise, numbers=(100, 200, 400, 700, 1400, 2800), sizes=(2e4, 1e5, 5e5, 2e6)):
    draw = np.random.default_rng(1)
    grid = [(n, p) for n in numbers for p in sizes]
    values = [1 - (1 - cosine(n, p)) * np.exp(noise * draw.normal()) for n, p in grid]
    return [n for n, _ in grid], [p for _, p in grid], values


def test_known_exponents_come_back_exactly_without_noise():
    found = scaling.fit(*cells(0.0)).values
    for name, value in TRUE.items():
        assert found[name]["value"] == pytest.approx(value, rel=0.02), name


def test_known_exponents_lie_within_the_intervals_with_noise():
    found = scaling.fit(*cells(0.01)).values
    assert found["alpha"]["value"] == pytest.approx(TRUE["alpha"], abs=0.15)
    for name in ("alpha", "beta", "E"):
        assert found[name]["low"] - 0.02 <= TRUE[name] <= found[name]["high"] + 0.02, name


def test_a_variable_that_does_not_vary_has_no_term():
    numbers = [100, 200, 400, 800, 1600]
    found = scaling.fit(numbers, [1e6] * 5, [1 - 2 * n**-0.5 for n in numbers]).values
    assert found["B"] is None
    assert found["alpha"]["value"] == pytest.approx(0.5, abs=0.02)


def test_a_fit_needs_enough_cells():
    with pytest.raises(InputError, match="3 numbers of concepts"):
        scaling.fit([100, 200] * 4, [1, 2, 3, 4] * 2, [0.5] * 8)


def row(n, p, value, seed=0):
    from pipeline.options import Cell

    cell = Cell(concepts=n, hidden_dim=int(p), seed=seed)
    return vars(cell) | {"name": cell.name, "parameters": p, "test_cosine": value}


def test_larger_cells_are_predicted_before_they_are_seen_and_checked_afterwards():
    rows = [row(*one) for one in zip(*cells(0.01), strict=True)]
    receipt = scaling.predict(rows, rows, 700)
    assert {cell["concepts"] for cell in receipt["cells"]} == {1400, 2800}
    hidden = [one | {"test_cosine": float("nan")} if one["concepts"] > 700 else one for one in rows]
    assert scaling.predict(hidden, rows, 700) == receipt  # nothing of the larger cells is looked at
    checked = scaling.check(receipt, rows)
    assert checked["cells"] == 8
    assert checked["coverage"] >= 0.5
    assert checked["most"] < 0.03
    assert scaling.check(receipt, []) is None


def test_a_family_shares_all_but_size_and_seed():
    rows = [row(n, p, 0.5, seed) for n in (100, 200, 400) for p in (8, 16) for seed in (0, 1)]
    other = [one | {"objective": "mse"} for one in rows[:4]]
    assert [len(own) for own in scaling.families(rows + other).values()] == [12]
