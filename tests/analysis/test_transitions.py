"""A late, steep rise of validation is a transition; drift and early learning are not."""

import numpy as np
import pytest

from pipeline.analysis.transitions import describe, detect

EPOCHS = [round(2 ** (step / 8)) for step in range(8, 96)]


def curve(middle, steep, top):
    return [top / (1 + (middle / epoch) ** steep) for epoch in EPOCHS]


def test_a_late_steep_rise_is_found_and_dated():
    loss = [1 - value for value in curve(10, 4, 1.0)]
    found = detect(EPOCHS, loss, curve(800, 8, 0.9))
    assert found.late
    assert found.memorised == pytest.approx(18, abs=6)
    assert 600 < found.steepest < 1800
    assert found.rise > 0.5


def test_learning_together_is_no_transition():
    loss = [1 - value for value in curve(10, 4, 1.0)]
    assert not detect(EPOCHS, loss, curve(10, 4, 0.6)).late
    drift = np.array(curve(10, 4, 0.6)) + 0.02 * np.log2(EPOCHS) / 12
    assert not detect(EPOCHS, loss, drift).late


def test_without_memorising_there_is_none():
    found = detect(EPOCHS, [0.5] * len(EPOCHS), curve(800, 8, 0.9))
    assert found.memorised is None
    assert not found.late


def test_the_sentence_says_so_honestly():
    loss = [1 - value for value in curve(10, 4, 1.0)]
    flat = {"name": "flat", "curves": {"epoch": EPOCHS, "train_loss": loss, "val_cosine": curve(10, 4, 0.6)}}
    late = {"name": "late", "curves": {"epoch": EPOCHS, "train_loss": loss, "val_cosine": curve(800, 8, 0.9)}}
    assert describe([flat]).startswith("No phase transition in 1 runs")
    assert "late at epoch" in describe([flat, late])
