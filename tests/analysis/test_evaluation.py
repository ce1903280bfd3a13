"""Evaluation: the true vector recovers all of the teacher's function and the mean none of it; groups and intervals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.analysis.evaluation import evaluate, evaluation_table
from pipeline.analysis.intervention import NextTokenDistributions, kl_recovered, recovered_interval
from pipeline.data.dataset import Dataset
from pipeline.errors import InputError
from pipeline.settings import Cell
from pipeline.training.export import checkpoint
from pipeline.training.trainer import train_stack

CPU = torch.device("cpu")


def students(data, cell, seeds=1):
    cells = [replace(cell, seed=seed) for seed in range(seeds)]
    subset = data.subset(cell)
    return [
        checkpoint(trained.cell, trained.parameters, subset, data, trained.metrics)
        for trained in train_stack(cells, [subset] * seeds, CPU)
    ]


@pytest.fixture(scope="module")
def said(data, smollm2):
    rows = data.rows("test")[:24]
    vectors = data.vectors
    continued = NextTokenDistributions(smollm2[1], [vectors.concepts[row] for row in rows], vectors.templates[0], 15)
    return continued, torch.from_numpy(vectors.vectors[rows, 0, vectors.layer_index(15)].astype(np.float32))


@pytest.mark.system
def test_the_true_vector_recovers_everything_and_the_mean_nothing(said, data):
    continued, truth = said
    mean = data.subset(Cell(layer=15)).mean.expand_as(truth)
    of_mean = continued.kl(mean)
    assert of_mean.mean() > 0.3
    assert kl_recovered(continued.kl(truth), of_mean) == pytest.approx(1, abs=1e-3)
    assert kl_recovered(continued.kl(mean), of_mean) == 0
    half = kl_recovered(continued.kl((truth + mean) / 2), of_mean)
    assert 0.1 < half < 0.95
    low, high = recovered_interval(continued.kl((truth + mean) / 2)[None], of_mean)
    assert low < half < high


def test_next_tokens_are_those_of_the_plain_model(said, smollm2, data):
    teacher = smollm2[1]
    ids = continued_ids = said[0].prompts[0]
    with torch.inference_mode():
        expected = teacher.causal(input_ids=torch.tensor([continued_ids])).logits[0, -1].log_softmax(-1)
    assert ids
    torch.testing.assert_close(said[0].true[0], expected, atol=1e-3, rtol=1e-3)


def test_means_over_tokens_cannot_take_the_place_of_one_activation(data, smollm2):
    pooled = Dataset(replace(data.vectors, pool="mean"))
    with pytest.raises(InputError, match=r"--teacher: .* mean"):
        evaluate({}, pooled, smollm2[1])


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "gemma3"])
def test_any_block_of_any_architecture_can_be_replaced(tiny_folder, architecture):
    from pipeline.teachers.find import find_teacher
    from pipeline.teachers.load import load_teacher
    from pipeline.teachers.residuals import residuals

    teacher = load_teacher(find_teacher(str(tiny_folder(architecture)), "float32"))
    concepts = ["ice", "slow cooking", "a"]
    for layer in (0, 2, 4):
        continued = NextTokenDistributions(teacher, concepts, "Tell me about {concept}", layer)
        truth = torch.cat([residuals(teacher, torch.tensor([ids]), [layer])[0, :, -1] for ids in continued.prompts])
        assert continued.kl(truth).max() < 1e-6
        assert continued.kl(truth.flip(0)).max() > 1e-5


def test_seeds_are_measured_together_with_intervals(data):
    base = Cell(concepts=150, hidden_dim=32, epochs=5, layer=15)
    linear = Cell(student="ridge", concepts=150, layer=15, inputs="embeddings")
    rows = evaluate({"mlp": students(data, base, 3), "ridge": students(data, linear)}, data)
    assert [row["student"] for row in rows] == [
        "(mean, 150 concepts)",
        "(nearest, 150 concepts, activations)",
        "mlp",
        "(nearest, 150 concepts, embeddings)",  # a student's baseline reads what it reads
        "ridge",
    ]
    assert rows[1]["test_cosine"] != rows[3]["test_cosine"]
    for row in rows[1:]:
        assert row["test_cosine_low"] < row["test_cosine"] < row["test_cosine_high"]
        assert 0 < row["test_cka"] < 1
    assert rows[2]["seeds"] == 3
    assert rows[0]["test_cosine"] == 0
    assert set(rows[2]["by"]) == {"category", "tokens", "frequency"}
    assert len(rows[2]["by"]["category"]) == 19
    for row in (rows[2], rows[4]):
        for found in row["by"].values():
            assert sum(group["concepts"] for group in found.values()) == len(data.rows("test"))
            assert all(group["low"] - 1e-6 <= group["cosine"] <= group["high"] + 1e-6 for group in found.values())
            whole = sum(group["concepts"] * group["cosine"] for group in found.values()) / len(data.rows("test"))
            assert whole == pytest.approx(row["test_cosine"], abs=1e-6)
    head, table = evaluation_table(rows)
    assert len(head) == len(table[0])
