"""Students of a large vectors file: their folders do not grow with it, and all that is held out can be asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHIPPED
from vocabularies import find_vocabulary

from pipeline import Student
from pipeline.analysis.evaluation import evaluate
from pipeline.data.dataset import Dataset
from pipeline.data.examples import Examples
from pipeline.extraction.vocabulary import fastest_tokenization
from pipeline.settings import Cell
from pipeline.training.export import CATALOGUE_SIZE, STORED_CONCEPTS, checkpoint, export, for_rows
from pipeline.training.trainer import predict, train_stack

CPU = torch.device("cpu")
NUMBER = STORED_CONCEPTS + 3000
RIDGE = Cell(student="ridge", concepts=100, layer=15)


@pytest.fixture(scope="module")
def vocabulary(vectors):
    return find_vocabulary(vectors, SHIPPED)


@pytest.fixture(scope="module")
def large(vectors, vocabulary):
    """The shipped vectors at two blocks over and over, with names and tokens of their own."""
    rows = np.arange(NUMBER) % len(vectors.concepts)
    concepts = tuple(f"{vectors.concepts[row]} {number}" for number, row in enumerate(rows))
    tokens = fastest_tokenization(vocabulary, vectors)(concepts)
    token_vocab = np.unique(tokens.values)
    splits = (*vectors.splits, *["train"] * (NUMBER - len(vectors.splits)))
    lists = {"categories": tuple(vectors.categories[row] for row in rows), "splits": splits}
    tables = {name: vocabulary.tables[name][token_vocab] for name in ("token_embeddings", "token_activations")}
    stored = vectors.vectors[rows][:, :, [vectors.layer_index(layer) for layer in (2, 15)]]
    made = replace(vectors, vectors=stored, layers=(2, 15), concepts=concepts, **lists)
    return Dataset(
        replace(made, token_ids=tokens.values, token_offsets=tokens.offsets, token_vocab=token_vocab, **tables)
    )


def trained(cell, data):
    [result] = train_stack([cell], [data.subset(cell)], CPU)
    return result, checkpoint(cell, result.parameters, data.subset(cell), data, result.metrics)


@pytest.mark.parametrize("cell", [RIDGE, replace(RIDGE, inputs="block2")], ids=["tokens", "block"])
def test_a_checkpoint_holds_what_is_held_out_and_a_bounded_number_of_others(large, tmp_path, cell):
    result, made = trained(cell, large)
    made.save(tmp_path / "student")
    back = Student.load(tmp_path / "student")
    assert len(back.concepts) == STORED_CONCEPTS
    assert back.summary == "answers for 20,000 concepts of its vectors file"
    subset = large.subset(cell)
    train = Examples(subset.train.rows, subset.train.inputs[:], subset.train.targets[:])
    for side in (subset.test, subset.val, train):
        names = [large.vectors.concepts[row] for row in side.rows]
        expected = (predict("ridge", result.parameters, side) + subset.mean).numpy()
        np.testing.assert_allclose(back.encode(names), expected, rtol=1e-4, atol=2e-4)
        np.testing.assert_array_equal(for_rows(back, large, side.rows).encode(names), back.encode(names))
    known = set(back.concepts)
    left_out = next(row for row, name in enumerate(large.vectors.concepts) if name not in known)
    assert np.isfinite(for_rows(back, large, [left_out]).encode(large.vectors.concepts[left_out])).all()
    [*_, row] = evaluate({"ridge": [back]}, large)
    assert row["test_cosine"] == pytest.approx(result.metrics["test_cosine"], abs=1e-5)


def test_an_exported_student_names_the_concepts_of_its_catalogue_only(large, vocabulary, tmp_path):
    alone = export(trained(RIDGE, large)[1], large, vocabulary)
    alone.save(tmp_path / "student")
    back = Student.load(tmp_path / "student")
    assert len(back.concepts) == len(back.catalogue.values) == CATALOGUE_SIZE
    row = large.vectors.concepts.index(back.concepts[-1])
    [[(name, cosine)]] = back.nearest(large.vectors.vectors[[row], 0, 1].astype(np.float32), 1)
    assert cosine > 0.999
    assert name.rpartition(" ")[0] == back.concepts[-1].rpartition(" ")[0]  # the same vector under other names
