"""Scaling laws: known exponents come back from noisy data, and predictions keep their word."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from pipeline.analysis import scaling
from pipeline.errors import InputError

TRUE = {"E": 0.15, "A": 3.0, "alpha": 0.45, "B": 20.0, "beta": 0.5}


def cosine(n, p):
    return 1 - (TRUE["E"] + TRUE["A"] * n ** -TRUE["alpha"] + TRUE["B"] * p ** -TRUE["beta"])


def cells(noise, numbers=(100, 200, 400, 700, 1400, 2800), sizes=(2e4, 1e5, 5e5, 2e6)):
    draw = np.random.default_rng(1)
    grid = [(n, p) for n in numbers for p in sizes]
    values = [1 - (1 - cosine(n, p)) * np.exp(noise * draw.normal()) for n, p in grid]
    return [n for n, _ in grid], [p for _, p in grid], values


def cells_of(truth, numbers, sizes):
    grid = [(n, p) for n in numbers for p in sizes]
    return [n for n, _ in grid], [p for _, p in grid], [truth(n, p) for n, p in grid]


def test_known_exponents_come_back_exactly_without_noise():
    found = scaling.fit(*cells(0.0)).values
    for name, value in TRUE.items():
        assert found[name]["value"] == pytest.approx(value, rel=0.02), name


def test_known_exponents_lie_within_the_intervals_with_noise():
    found = scaling.fit(*cells(0.01)).values
    assert found["alpha"]["value"] == pytest.approx(TRUE["alpha"], abs=0.15)
    for name in ("alpha", "beta", "E"):
        assert found[name]["low"] - 0.02 <= TRUE[name] <= found[name]["high"] + 0.02, name


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.05])
def test_the_fit_and_its_bootstrap_are_where_least_squares_of_scipy_ends(noise):
    concepts, sizes, values = cells(noise)
    law = scaling.fit(concepts, sizes, values)
    n, p, errors = np.log(concepts), np.log(sizes), np.log(1 - np.array(values))

    def loss(residuals, counts):
        z = np.square(residuals / scaling.HUBER)
        return (counts * np.where(z <= 1, z, 2 * np.sqrt(z) - 1)).sum()

    def residuals(e, a, alpha, b, beta):
        return np.log(np.exp(e) + np.exp(a - alpha * n) + np.exp(b - beta * p)) - errors

    draw = np.random.default_rng(0)
    drawn = draw.integers(len(errors), size=(scaling.BOOTSTRAPS, len(errors)))
    for number, parameters in enumerate([law.parameters, *law.samples[:20]]):
        rows = drawn[number - 1] if number else np.arange(len(errors))
        best = least_squares(
            lambda x, rows=rows: residuals(*x)[rows], law.parameters, bounds=scaling.BOUNDS, loss="huber",
            f_scale=scaling.HUBER, x_scale="jac", xtol=1e-12, ftol=1e-12,
        )  # fmt: skip
        counts = np.bincount(rows, minlength=len(errors))
        assert loss(residuals(*parameters), counts) <= loss(residuals(*best.x), counts) * (1 + 1e-5)


def test_a_variable_that_does_not_vary_has_no_term():
    numbers = [100, 200, 400, 800, 1600]
    found = scaling.fit(numbers, [1e6] * 5, [1 - 2 * n**-0.5 for n in numbers]).values
    assert found["B"] is None
    assert found["alpha"]["value"] == pytest.approx(0.5, abs=0.02)


def test_a_fit_needs_enough_cells():
    with pytest.raises(InputError, match="3 numbers of concepts"):
        scaling.fit([100, 200] * 4, [1, 2, 3, 4] * 2, [0.5] * 8)


def row(n, p, value, seed=0):
    from pipeline.settings import Cell

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
    assert checked["coverage"] >= 0.75
    assert checked["most"] < 0.03
    assert scaling.check(receipt, []) is None


def bent(draw):
    """A law that is not of the fitted form: its slope changes with the number of concepts."""
    bend = draw.choice([-1, 1]) * draw.uniform(0.02, 0.08)
    return lambda n, p: 1 - (1 - cosine(n, p)) * np.exp(bend * np.log(n / 100) ** 2 / 2)


def test_intervals_of_predictions_hold_what_they_promise_though_the_law_bends():
    inside = []
    for number in range(8):
        draw = np.random.default_rng(number)
        truth = bent(draw)
        grid = [(n, p) for n in (100, 141, 200, 283, 400) for p in (4e4, 2e5, 9e5) for _ in range(2)]
        noisy = [1 - (1 - truth(n, p)) * np.exp(0.004 * draw.normal()) for n, p in grid]
        law = scaling.fit(*zip(*grid, strict=True), noisy)
        for n, p in [(n, p) for n in (700, 1838) for p in (4e4, 2e5, 9e5)]:
            low, high = law.interval(n, p)
            inside.append(low <= truth(n, p) <= high)
    assert np.mean(inside) >= 0.8


def test_a_law_that_holds_lacks_nothing_and_one_that_bends_lacks_its_bend():
    numbers, sizes = (100, 141, 200, 283, 400), (4e4, 2e5, 9e5)
    true, wrong = (scaling.fit(*cells_of(truth, numbers, sizes)) for truth in (cosine, bent(np.random.default_rng(1))))
    assert true.curvature_error < 1e-4
    low, high = true.interval(3200, 2e5)
    assert high - low < 2e-3
    assert 0.005 < wrong.curvature_error < 0.04
    inner, outer = wrong.interval(400, 2e5), wrong.interval(3200, 2e5)
    assert outer[1] - outer[0] > inner[1] - inner[0] + 0.01  # the farther, the less is known


def test_where_nothing_can_be_cut_off_the_bend_is_not_known():
    assert scaling.fit(*cells_of(cosine, (100, 200, 400), (4e4, 2e5, 9e5))).curvature_error is None


def test_a_family_shares_all_but_size_and_seed():
    rows = [row(n, p, 0.5, seed) for n in (100, 200, 400) for p in (8, 16) for seed in (0, 1)]
    other = [one | {"objective": "mse"} for one in rows[:4]]
    assert [len(own) for own in scaling.families(rows + other).values()] == [12]
