"""A member of a stack gets the same result as in a stack of its own, and students learn what can be learnt."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from pipeline.data.dataset import Dataset
from pipeline.data.vectors import read_vectors
from pipeline.errors import InputError
from pipeline.settings import Cell
from pipeline.training.batches import Batches
from pipeline.training.closed_form import WELL_POSED, apply_kernel, fit_kernel, fit_ridge, residual_prior
from pipeline.training.curriculum import leave_one_out, num_shown
from pipeline.training.kinds import KINDS
from pipeline.training.stack import Stack, start_member
from pipeline.training.trainer import predict, stack_key, train_stack

SHORT = Cell(concepts=100, hidden_dim=32, layers=2, epochs=6, batch_size=48, layer=15, precision="float32")


CPU = torch.device("cpu")


def train(cells, data):
    return {result.cell: result for result in train_stack(cells, [data.subset(cell) for cell in cells], CPU)}


@pytest.mark.parametrize("objective", ["cosine", "mse"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_stacked_member_equals_the_student_alone(data, objective, dropout):
    base = replace(SHORT, objective=objective, dropout=dropout)
    cells = [
        base,
        replace(base, concepts=30, epochs=9),
        replace(base, seed=1, learning_rate=5e-3),
        replace(base, concepts=210, weight_decay=1.0, layer=6),
    ]
    assert len({stack_key(cell) for cell in cells}) == 1
    together = train(cells, data)
    for cell in cells:
        alone = train([cell], data)[cell]
        for curve in ("train_loss", "val_cosine"):
            np.testing.assert_allclose(together[cell].curves[curve], alone.curves[curve], atol=1e-4)
        assert together[cell].metrics == pytest.approx(alone.metrics, abs=1e-3)
        assert together[cell].best_epoch == alone.best_epoch


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "infonce"},
        {"objective": "cosine+0.1*infonce+0.5*mse", "dropout": 0.2},
        {"student": "transformer", "dropout": 0.2},
        {"skip": True},
        {"inputs": "embeddings+ngrams"},
        {"inputs": "bag"},
        {"inputs": "block4"},
        {"noise": 0.3, "mixup": 0.4, "token_dropout": 0.3},
        {"curriculum": "frequency"},
        {"curriculum": "ridge", "evaluations": "log"},
        {"split": "categories"},
    ],
    ids=str,
)
def test_every_option_of_training_is_the_same_in_a_stack(data, options):
    base = replace(SHORT, **options)
    cells = [base, replace(base, concepts=30, epochs=9), replace(base, seed=1, learning_rate=5e-3)]
    together = train(cells, data)
    for cell in cells:
        alone = train([cell], data)[cell]
        assert together[cell].curves["epoch"] == alone.curves["epoch"]
        for curve in ("train_loss", "val_cosine"):
            np.testing.assert_allclose(together[cell].curves[curve], alone.curves[curve], atol=1e-4)


@pytest.mark.system
@pytest.mark.parametrize("student", [name for name, kind in KINDS.items() if kind.closed_form])
def test_closed_forms_are_the_same_in_a_stack(data, student):
    cells = [Cell(student=student, concepts=number, layer=15) for number in (60, 150)]
    together = train(cells, data)
    for cell in cells:
        assert together[cell].metrics == pytest.approx(train([cell], data)[cell].metrics, abs=1e-6)


def test_several_templates_are_several_targets(templates):
    base = replace(SHORT, epochs=4, dropout=0.0)
    first, mean, every = (templates.subset(replace(base, targets=targets)) for targets in ("first", "mean", "all"))
    assert (first.variants, mean.variants, every.variants) == (1, 1, 4)
    assert every.augmented.inputs.shape == (400, first.train.inputs.shape[1])
    torch.testing.assert_close(every.augmented.targets[::4], first.train.targets[:])
    averaged = every.augmented.targets[:].view(100, 4, -1).mean(1)
    torch.testing.assert_close(averaged, mean.train.targets[:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mean.test.targets, first.test.targets)
    cell = replace(base, targets="all")
    curves = [train([cell, replace(cell, seed=1)], templates)[cell].curves, train([cell], templates)[cell].curves]
    np.testing.assert_allclose(curves[0]["val_cosine"], curves[1]["val_cosine"], atol=1e-4)


def test_a_linear_skip_begins_as_ridge_regression(data):
    cell = replace(SHORT, concepts=300, skip=True, epochs=1, learning_rate=1e-9, dropout=0.0)
    alone = Cell(student="ridge", concepts=300, layer=15)
    assert train([cell], data)[cell].metrics["test_cosine"] == pytest.approx(
        train([alone], data)[alone].metrics["test_cosine"], abs=1e-3
    )


def test_an_epoch_shows_every_concept_once_in_batches_of_like_size(data):
    cells = [replace(SHORT, concepts=700, epochs=2, batch_size=128), replace(SHORT, concepts=100, batch_size=128)]
    stack = Stack([start_member(cell, data.subset(cell)) for cell in cells], CPU, "float32")
    shown = stack.batches.is_real  # [2, steps, B]
    assert shown.sum(-1)[0].tolist() == 2 * [117, 117, 117, 117, 116, 116]
    assert shown.sum(-1)[1].tolist() == 6 * [100] + 6 * [0]
    first = stack.batches.order[0, :6][shown[0, :6]]
    assert sorted(first.tolist()) == list(range(700))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": "mean"},
        {"targets": "all", "token_dropout": 0.3},
        {"precision": "bfloat16"},
        {"curriculum": "ridge"},
    ],
)
def test_batches_that_are_computed_ahead_equal_those_in_memory(data, templates, monkeypatch, options):
    source = templates if "targets" in options else data
    cells = [replace(SHORT, concepts=number, **options) for number in (100, 30)]
    members = [(cell, source.subset(cell)) for cell in cells]
    in_memory = Batches(members, torch.float32, CPU)
    monkeypatch.setattr("pipeline.training.batches.RESIDENT_BYTES", 0)
    monkeypatch.setattr("pipeline.training.batches.ROWS_AHEAD", 200)
    ahead = Batches(members, torch.float32, CPU)
    for step in (*range(in_memory.order.shape[1]), 0):
        for one, other in zip(in_memory[step], ahead[step], strict=True):
            real = in_memory[step].weights.bool()
            assert torch.equal(one[real], other[real])


def test_log_spaced_evaluations_are_few_and_end_at_the_last_epoch(data):
    cell = replace(SHORT, concepts=20, epochs=64, evaluations="log", dropout=0.0)
    trained = train([cell], data)[cell]
    epochs = trained.curves["epoch"]
    assert epochs[:3] == [1, 2, 3]
    assert epochs[-1] == 64
    assert len(epochs) < 45
    assert len(epochs) == len(trained.curves["train_loss"]) == len(trained.curves["val_cosine"])
    every = train([replace(cell, evaluations="every")], data)[replace(cell, evaluations="every")]
    chosen = [every.curves["val_cosine"][epoch - 1] for epoch in epochs]
    np.testing.assert_allclose(trained.curves["val_cosine"], chosen, atol=1e-5)


def test_whole_categories_can_be_held_out(data):
    subset = data.subset(Cell(concepts=200, layer=15, split="categories"))
    sides = {
        side: {data.vectors.categories[row] for row in getattr(subset, side).rows} for side in ("train", "val", "test")
    }
    assert not sides["train"] & sides["test"] | sides["train"] & sides["val"] | sides["val"] & sides["test"]
    assert len(sides["test"]) >= 2


def test_leaving_one_out_in_closed_form_equals_doing_so(data):
    subset = data.subset(Cell(concepts=40, layer=15))
    strength = fit_ridge(subset).strength
    x, y = subset.train.inputs[:].double(), subset.train.targets[:].double() / subset.scale
    passed = x @ residual_prior(subset)
    found = leave_one_out(subset)
    for left in (0, 7, 39):
        rest = [row for row in range(40) if row != left]
        gram = x[rest] @ x[rest].mT + strength * torch.eye(39, dtype=torch.float64)
        answer = passed[left] + x[left] @ x[rest].mT @ torch.linalg.solve(gram, (y - passed)[rest])
        assert torch.cosine_similarity(answer, y[left], dim=0).item() == pytest.approx(found[left].item(), abs=1e-8)


def test_a_curriculum_shows_the_easy_ones_first():
    cell = Cell(curriculum="ridge", epochs=10, pace=0.5)
    assert [num_shown(cell, epoch, 100) for epoch in (0, 2, 5, 9)] == [25, 55, 100, 100]


@pytest.mark.system
def test_members_that_stop_early_leave_the_others_alone(data):
    # A rate at which some stop early; at twice the rate, rounding differences between stacks would grow.
    base = replace(SHORT, dropout=0.0, epochs=30, learning_rate=3e-2, concepts=60, inputs="embeddings")
    cells = [
        replace(base, seed=1),
        replace(base, concepts=20, patience=2),
        replace(base, concepts=200),
        replace(base, concepts=20, seed=3, patience=1),
    ]
    together = train(cells, data)
    lengths = {cell: len(together[cell].curves["val_cosine"]) for cell in cells}
    assert lengths[cells[0]] == lengths[cells[2]] == 30 > min(lengths.values())
    for cell in cells:
        trained = together[cell]
        if cell.patience:
            assert lengths[cell] == min(30, trained.best_epoch + cell.patience)
        alone = train([cell], data)[cell]
        np.testing.assert_allclose(trained.curves["val_cosine"], alone.curves["val_cosine"], atol=1e-4)


@pytest.mark.system
def test_bfloat16_costs_little(data):
    exact = replace(SHORT, concepts=400, hidden_dim=64, epochs=15, batch_size=128)
    cells = [exact, replace(exact, precision="bfloat16")]
    cosines = [train([cell], data)[cell].metrics["test_cosine"] for cell in cells]
    assert cosines[0] == pytest.approx(cosines[1], abs=2e-3)


def test_seeds_differ_and_repeat(data):
    first, again, other = (
        train([cell], data)[cell].curves["val_cosine"] for cell in (SHORT, SHORT, replace(SHORT, seed=1))
    )
    assert first == again
    assert first != other


def test_the_best_epoch_is_the_one_that_is_kept(data):
    cell = replace(SHORT, dropout=0.0, epochs=25, learning_rate=2e-2, concepts=40)
    trained = train([cell], data)[cell]
    scores = trained.curves["val_cosine"]
    assert len(scores) == cell.epochs
    assert trained.best_epoch == 1 + int(np.argmax(scores))
    assert trained.metrics["val_cosine"] == pytest.approx(max(scores), abs=1e-5)


@pytest.mark.system
@pytest.mark.parametrize("objective", ["cosine", "mse"])
def test_an_mlp_without_dropout_can_memorise_its_training_concepts(data, objective):
    cell = replace(SHORT, objective=objective, concepts=40, hidden_dim=128, epochs=200, dropout=0.0, weight_decay=0.0)
    trained = train([cell], data)[cell]
    assert trained.curves["train_loss"][-1] < 0.02


@pytest.mark.system
@pytest.mark.parametrize("objective", ["cosine", "mse"])
def test_the_length_of_an_answer_is_right_too(data, objective):
    cell = replace(SHORT, objective=objective, concepts=700, hidden_dim=128, epochs=30)
    trained = train([cell], data)[cell]
    subset = data.subset(cell)
    answer = predict("mlp", trained.parameters, subset.val)
    gain = ((answer * subset.val.targets).sum() / answer.square().sum()).item()
    assert gain == pytest.approx(1, abs=0.15)
    assert trained.metrics["test_r2"] > 0.2


def test_ridge_agrees_with_scikit_learn(data):
    subset = data.subset(Cell(concepts=200, layer=15))
    fitted = fit_ridge(subset)
    reference = Ridge(alpha=fitted.strength, fit_intercept=False, solver="svd")
    prior, x = residual_prior(subset), subset.train.inputs[:].double()
    reference.fit(x.numpy(), ((subset.train.targets[:] / subset.scale).double() - x @ prior).numpy())
    np.testing.assert_allclose(fitted.parameters["weight"].numpy().T, reference.coef_ + prior.numpy().T, atol=1e-5)
    assert 0.5 < fitted.val_cosine < 0.8


def test_ridge_in_the_space_of_features_agrees_with_the_dual_form(data, monkeypatch):
    """The same regression where concepts are few and where they are many, with leave-one-out errors."""
    cell = Cell(concepts=300, layer=15)
    dual, dual_errors = fit_ridge(data.subset(cell)), leave_one_out(data.subset(cell))
    other = Dataset(data.vectors).subset(cell)
    monkeypatch.setattr("pipeline.data.examples.MAX_CHUNK", 64)
    monkeypatch.setattr("pipeline.training.closed_form._is_dual", lambda shape: False)
    primal, primal_errors = fit_ridge(other), leave_one_out(other)
    assert primal.strength == pytest.approx(dual.strength, rel=1e-9)
    assert primal.val_cosine == pytest.approx(dual.val_cosine, abs=1e-9)
    torch.testing.assert_close(primal.parameters["weight"], dual.parameters["weight"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(primal_errors, dual_errors, atol=1e-7, rtol=0)


def test_products_in_float32_move_the_map_of_many_concepts_by_less_than_a_hundred_thousandth(
    workplace, run, tiny_folder, monkeypatch
):
    command = (
        "extract",
        "--teacher",
        tiny_folder("gpt2"),
        "--concepts",
        "wordfreq:en:1200",
        "--output",
        "tiny.safetensors",
    )
    code, _, err = run(*command, "--no-vocabulary")
    assert code == 0, err
    vectors = read_vectors(workplace / "tiny.safetensors")
    cell = Cell(student="ridge", concepts=700, layer=vectors.middle_layer)
    subset = Dataset(vectors).subset(cell)
    assert len(subset.train.inputs) >= WELL_POSED * subset.train.inputs.shape[1]
    found = fit_ridge(subset)
    monkeypatch.setattr("pipeline.training.closed_form.WELL_POSED", 1000)
    exact = fit_ridge(Dataset(vectors).subset(cell))
    weight, expected = found.parameters["weight"], exact.parameters["weight"]
    assert 0 < (weight - expected).norm() < 1e-5 * expected.norm()
    assert found.strength == pytest.approx(exact.strength, rel=1e-5)


def test_a_kernel_at_all_concepts_is_exact_and_at_some_nearly_so(data, monkeypatch):
    cell = Cell(student="kernel", concepts=400, layer=15)
    subset = data.subset(cell)
    exact = fit_kernel(subset)
    x, maps = subset.train.inputs[:].double().numpy(), exact.parameters
    y = (
        subset.train.targets[:].double() / subset.scale - subset.train.inputs[:].double() @ residual_prior(subset)
    ).numpy()
    reference = KernelRidge(alpha=exact.strength, kernel="rbf", gamma=float(maps["width"]))
    reference.fit(x, y)
    np.testing.assert_allclose(maps["weight"].numpy(), reference.dual_coef_, atol=1e-3)
    held = subset.val.inputs.double().numpy()
    answer = apply_kernel({name: value[None] for name, value in maps.items()}, subset.val.inputs[None])[0]
    expected = reference.predict(held) + held @ residual_prior(subset).numpy()
    np.testing.assert_allclose(answer.numpy(), expected, atol=1e-3)
    monkeypatch.setattr("pipeline.training.closed_form.LANDMARKS", 200)
    assert fit_kernel(subset).val_cosine == pytest.approx(exact.val_cosine, abs=0.02)


def test_the_prior_of_a_linear_map_is_a_scaled_identity_of_each_residual_input(data):
    subset = data.subset(Cell(student="truncated", blocks=6, concepts=200, layer=15))
    x, y = subset.train.inputs[:].double(), subset.train.targets[:].double() / subset.scale
    weight = residual_prior(subset)
    width = data.vectors.d_model
    kept = [weight[start : start + width] for start in range(0, len(weight), width)]
    assert all(torch.equal(part, part.diagonal()[0] * torch.eye(width, dtype=torch.float64)) for part in kept)
    spread = y.std(0)
    gains = np.linalg.lstsq(
        np.stack([(x[:, s : s + width] / spread).flatten().numpy() for s in range(0, len(weight), width)], 1),
        (y / spread).flatten().numpy(),
        rcond=None,
    )[0]
    np.testing.assert_allclose([float(part[0, 0]) for part in kept], gains, rtol=1e-6)
    bag = data.subset(Cell(student="ridge", inputs="bag", concepts=200, layer=15))
    assert not residual_prior(bag).any()


def test_ridge_answers_in_the_units_of_the_vectors(data):
    cell = Cell(student="ridge", concepts=700, layer=15)
    trained = train([cell], data)[cell]
    assert trained.metrics["test_cosine"] > 0.74
    assert trained.metrics["test_r2"] > 0.45


def test_training_subsets_are_nested_and_measured_on_themselves(data):
    small, large = (data.subset(Cell(concepts=number, layer=15)) for number in (100, 400))
    assert small.train.rows == large.train.rows[:100]
    assert small.test.rows == large.test.rows
    assert not set(large.train.rows) & set(large.val.rows + large.test.rows)
    assert small.train.targets[:].mean(0).abs().max() < 1e-2 * small.scale
    torch.testing.assert_close(
        small.train.inputs[:].mean(0), torch.zeros(small.train.inputs.shape[1]), atol=1e-4, rtol=0
    )


def test_more_concepts_than_there_are_for_training_are_refused(data):
    available = len(data.rows("train"))
    with pytest.raises(InputError, match=f"--concepts {available + 1}: the vectors file has {available}"):
        data.subset(Cell(concepts=available + 1, layer=15))
    with pytest.raises(InputError, match="available: 1, 2, 4, 6, 15, 22"):
        data.subset(Cell(concepts=100, layer=7))
