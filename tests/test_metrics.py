"""Metrics and objectives agree with independent implementations, also where inputs are degenerate."""

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import cosine_similarity

from pipeline.metrics import by_category, cosines, faithfulness, r2, ranks
from pipeline.objectives import OBJECTIVES


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 12, generator=generator)
    return truth + 0.7 * torch.randn(50, 12, generator=generator), truth, torch.randn(12, generator=generator)


def test_metrics_agree_with_scikit_learn(pairs):
    predicted, truth, mean = pairs
    found = faithfulness(predicted, truth, mean)
    similarity = cosine_similarity(predicted.numpy(), truth.numpy())
    assert found["cosine"] == pytest.approx(similarity.diagonal().mean(), abs=1e-6)
    raw = cosine_similarity((predicted + mean).numpy(), (truth + mean).numpy()).diagonal().mean()
    assert found["cosine_raw"] == pytest.approx(raw, abs=1e-6)
    centred = truth - truth.mean(0)  # scikit-learn centres on the mean of the truths that it is given
    shifted = predicted - truth.mean(0)
    expected = r2_score(centred.numpy(), shifted.numpy(), multioutput="variance_weighted")
    assert r2(shifted, centred).item() == pytest.approx(expected, abs=1e-5)
    order = (-similarity).argsort(1)
    place = [int(np.flatnonzero(order[row] == row)[0]) for row in range(50)]
    assert ranks(predicted, truth).tolist() == place
    assert found["retrieval_at_5"] == pytest.approx(np.mean([rank < 5 for rank in place]))


def test_perfect_predictions_score_one_and_the_mean_scores_zero(pairs):
    _, truth, mean = pairs
    perfect = faithfulness(truth, truth, mean)
    assert all(value == pytest.approx(1.0, abs=1e-6) for value in perfect.values())
    constant = faithfulness(torch.zeros_like(truth), truth, mean)
    assert constant["cosine"] == constant["r2"] == constant["retrieval_at_1"] == constant["retrieval_at_5"] == 0
    assert faithfulness(torch.ones_like(truth), truth, mean)["retrieval_at_5"] <= 0.2


def test_one_concept_and_zero_vectors_give_finite_numbers():
    one, nothing = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    for predicted, truth in ((one, one), (one, nothing), (nothing, one), (nothing, nothing)):
        assert all(np.isfinite(value) for value in faithfulness(predicted, truth, nothing[0]).values())


def test_categories_are_averaged_apart():
    assert by_category([1.0, 0.25, -1.0], ["b", "a", "b"]) == {"a": 0.25, "b": 0.0}


def test_objectives_average_over_real_rows_only(pairs):
    predicted, truth, _ = pairs
    stacked = torch.stack([predicted, truth]), torch.stack([truth, truth])
    weights = torch.ones(2, 50)
    weights[:, 40:] = 0
    cosine, mse = (OBJECTIVES[name](*stacked, weights) for name in ("cosine", "mse"))
    assert cosine[0].item() == pytest.approx(1 - cosines(predicted[:40], truth[:40]).mean().item(), abs=1e-6)
    assert mse[0].item() == pytest.approx((predicted[:40] - truth[:40]).square().mean().item(), abs=1e-6)
    assert cosine[1].item() == pytest.approx(0, abs=1e-6)
    assert mse[1].item() == 0
