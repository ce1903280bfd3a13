"""Metrics and objectives agree with independent implementations, also where inputs are degenerate."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, r2_score
from sklearn.metrics.pairwise import cosine_similarity

from pipeline.errors import InputError
from pipeline.metrics import by_category, cosines, faithfulness, interval, linear_cka, norm_error, r2, ranks
from pipeline.training.objectives import TERMS, objective_of, parse_objective


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


def reference(predicted, truth, mean):
    """All metrics concept by concept in float64, from their definitions."""
    p, t, mu = (values.double().numpy() for values in (predicted, truth, mean))

    def cosine(a, b):
        lengths = math.sqrt(a @ a) * math.sqrt(b @ b)
        return a @ b / lengths if lengths > 0 else 0.0

    total = sum(float(row @ row) for row in t)
    lost = sum(float(row @ row) for row in p - t)
    at = [sum(cosine(a, b) >= cosine(a, t[row]) - 1e-9 for b in t) - 1 for row, a in enumerate(p)]
    centred = [values - values.mean(0) for values in (p, t)]
    across, *own = (
        np.square(a.T @ b).sum() for a, b in ((centred[0], centred[1]), *zip(centred, centred, strict=True))
    )
    lengths = [math.sqrt(row @ row) for row in t + mu]
    off = [abs(math.sqrt(row @ row) - length) / (length or 1.0) for row, length in zip(p + mu, lengths, strict=True)]
    return {
        "cosine": np.mean([cosine(*pair) for pair in zip(p, t, strict=True)]),
        "cosine_raw": np.mean([cosine(*pair) for pair in zip(p + mu, t + mu, strict=True)]),
        "r2": 1 - lost / total if total else float(lost == 0),
        "retrieval_at_1": np.mean([rank < 1 for rank in at]),
        "retrieval_at_5": np.mean([rank < 5 for rank in at]),
        "cka": across / math.sqrt(own[0] * own[1]) if own[0] * own[1] > 0 else 0.0,
        "norm_error": np.mean(off),
    }


def degenerate():
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    some, other, mean = normal(9, 5), normal(9, 5), normal(5)
    holes = some * torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1, 1])[:, None]
    return {
        "random": (some, other, mean),
        "one concept": (some[:1], other[:1], mean),
        "one concept, right": (some[:1], some[:1], mean),
        "one concept, nothing said": (torch.zeros(1, 5), some[:1], mean),
        "constant predictions": (mean.expand(9, 5), some, mean),
        "constant truth": (some, torch.ones(9, 5), mean),
        "constant both": (torch.ones(9, 5), torch.ones(9, 5), torch.zeros(5)),
        "predictions without length": (holes, some, mean),
        "truths without length": (some, holes, torch.zeros(5)),
        "nothing at all": (torch.zeros(9, 5), torch.zeros(9, 5), torch.zeros(5)),
        "the mean takes away the truth": (some, -mean.expand(9, 5), mean),
        "opposite": (-some, some, torch.zeros(5)),
        "large": (1e6 * some, 1e6 * other, 1e6 * mean),
        "small": (1e-4 * some, 1e-4 * other, 1e-4 * mean),
    }


@pytest.mark.parametrize("case", degenerate())
def test_metrics_agree_with_a_float64_reference_also_where_inputs_are_degenerate(case):
    predicted, truth, mean = degenerate()[case]
    found = faithfulness(predicted, truth, mean)
    found |= {
        "cka": linear_cka(predicted, truth),
        "norm_error": norm_error(predicted + mean, truth + mean).mean().item(),
    }
    assert found == pytest.approx(reference(predicted, truth, mean), rel=1e-4, abs=1e-5)


def test_categories_are_averaged_apart():
    assert by_category([1.0, 0.25, -1.0], ["b", "a", "b"]) == {"a": 0.25, "b": 0.0}


def test_objectives_average_over_real_rows_only(pairs):
    predicted, truth, _ = pairs
    stacked = torch.stack([predicted, truth]), torch.stack([truth, truth])
    weights = torch.ones(2, 50)
    weights[:, 40:] = 0
    cosine, mse = (TERMS[name](*stacked, weights, 0.1) for name in ("cosine", "mse"))
    assert cosine[0].item() == pytest.approx(1 - cosines(predicted[:40], truth[:40]).mean().item(), abs=1e-6)
    assert mse[0].item() == pytest.approx((predicted[:40] - truth[:40]).square().mean().item(), abs=1e-6)
    assert cosine[1].item() == pytest.approx(0, abs=1e-6)
    assert mse[1].item() == 0


def test_cka_agrees_with_its_definition_by_gram_matrices(pairs):
    predicted, truth, _ = pairs
    centre = np.eye(50) - 1 / 50
    grams = [centre @ (values @ values.T) @ centre for values in (predicted.double().numpy(), truth.double().numpy())]
    expected = (grams[0] * grams[1]).sum() / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1])
    assert linear_cka(predicted, truth) == pytest.approx(expected, abs=1e-9)
    assert linear_cka(truth, truth) == pytest.approx(1)
    assert linear_cka(torch.ones(5, 3), torch.randn(5, 3)) == 0
    assert linear_cka(torch.ones(1, 3), torch.ones(1, 3)) == 0


def test_norm_error_is_a_share_of_the_true_length():
    truth = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert norm_error(2 * truth, truth).tolist() == [1.0, 0.0]
    assert norm_error(truth + torch.tensor([0.0, 1.0]), truth)[1].item() == 1.0


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        low, high = interval(draw.normal(size=(1, 80)), level=0.9, samples=300)
        inside += low <= 0 <= high
    assert 45 <= inside <= 60


def test_infonce_is_the_cross_entropy_of_scikit_learn(pairs):
    predicted, truth, _ = pairs
    similarity = cosine_similarity(predicted.double().numpy(), truth.double().numpy()) / 0.1
    softmax = [np.exp(values) / np.exp(values).sum(1, keepdims=True) for values in (similarity, similarity.T)]
    expected = np.mean([log_loss(np.arange(50), probability, labels=range(50)) for probability in softmax])
    found = TERMS["infonce"](predicted[None], truth[None], torch.ones(1, 50), 0.1)
    assert found.item() == pytest.approx(expected, abs=1e-4)
    padded = [torch.cat([values, torch.randn(7, 12)])[None] for values in (predicted, truth)]
    weights = torch.cat([torch.ones(50), torch.zeros(7)])[None]
    assert TERMS["infonce"](*padded, weights, 0.1).item() == pytest.approx(expected, abs=1e-4)


def test_objectives_are_weighted_sums(pairs):
    predicted, truth, _ = pairs
    batch = predicted[None], truth[None], torch.ones(1, 50)
    parts = {name: TERMS[name](*batch, 0.1).item() for name in TERMS}
    total = objective_of("cosine + 0.1*infonce + .5*mse", 0.1)(*batch).item()
    assert total == pytest.approx(parts["cosine"] + 0.1 * parts["infonce"] + 0.5 * parts["mse"], abs=1e-5)
    for wrong in ("cosin", "cosine+", "0*mse", "mse+mse", "-1*mse"):
        with pytest.raises(InputError, match="objective"):
            parse_objective(wrong)


def test_the_gradient_of_cosines_is_right():
    source = torch.Generator().manual_seed(0)
    predicted, truth = (torch.randn(2, 3, 5, generator=source, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda values: cosines(values, truth), predicted.requires_grad_())


def test_ranks_among_very_many_are_those_of_one_matrix():
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(6000, 8, generator=generator)  # three chunks
    truth[4000:4100] = truth[:100]  # ties across chunks
    predicted = truth + torch.randn(6000, 8, generator=generator)
    directions = [torch.nn.functional.normalize(values.double(), dim=-1) for values in (predicted, truth)]
    similarity = directions[0] @ directions[1].T
    expected = (similarity >= similarity.diagonal()[:, None] - 1e-7).sum(1) - 1
    assert (ranks(predicted, truth) != expected).float().mean() < 0.01  # the rounding of float32
    assert (ranks(truth, truth)[4000:4100] == 1).all()
    assert (ranks(truth, truth)[:100] == 1).all()
    some = torch.tensor([7, 0, len(truth) - 1])
    assert ranks(predicted, truth, some).tolist() == ranks(predicted, truth)[some].tolist()


def test_intervals_of_very_many_concepts_are_those_of_few():
    draw = np.random.default_rng(0)
    many = draw.standard_normal((1, 30_000))  # in chunks of samples
    low, high = interval(many)
    assert (high - low) / 2 == pytest.approx(1.96 * many.std() / math.sqrt(30_000), rel=0.05)
    assert low < many.mean() < high
    few = draw.standard_normal((3, 40))
    counts = np.random.default_rng(0)
    rows, columns = (counts.multinomial(size, np.full(size, 1 / size), 2000) for size in few.shape)
    means = [np.average(few, weights=np.outer(*pair)) for pair in zip(rows, columns, strict=True)]
    assert interval(few) == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_cka_of_very_many_is_that_of_whole_matrices():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9000, 6, generator=generator)
    y = x + torch.randn(9000, 6, generator=generator) + 5
    a, b = (values.double().numpy() - values.double().numpy().mean(0) for values in (x, y))
    expected = np.square(a.T @ b).sum() / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert linear_cka(x, y) == pytest.approx(expected)
