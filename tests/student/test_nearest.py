"""The nearest of any number of vectors are those of a brute-force search, in bounded memory."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHIPPED
from vocabularies import find_vocabulary

from pipeline import Student
from pipeline.data.vectors import StreamedTensor, read_unverified_header, stream_array, write_streamed, write_vectors
from pipeline.errors import InputError
from pipeline.settings import Cell
from pipeline.student.nearest import CHUNK_BYTES, Candidates
from pipeline.training.export import checkpoint, export
from pipeline.training.trainer import train_stack

CPU = torch.device("cpu")
LAYER = 15


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    cell = Cell(student="ridge", concepts=100, layer=LAYER)
    [trained] = train_stack([cell], [data.subset(cell)], CPU)
    made = checkpoint(cell, trained.parameters, data.subset(cell), data, trained.metrics)
    place = tmp_path_factory.mktemp("nearest") / "student"
    export(made, data, find_vocabulary(data.vectors, SHIPPED)).save(place)
    return place


@pytest.fixture(scope="module")
def student(folder):
    return Student.load(folder)


def among(directions):
    return Candidates([str(row) for row in range(len(directions))], lambda start, stop: directions[start:stop])


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def brute_force(queries, directions, count):
    """Places of the nearest in float64, the first of equal ones first."""
    cosines = unit(queries.astype(np.float64)) @ directions.T.astype(np.float64)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :count], cosines


@pytest.mark.parametrize("count", [1, 5, 700, 5000])
def test_equal_cosines_come_in_the_order_of_the_candidates(count):
    draw = np.random.default_rng(0)
    width = 4096  # so that 2,600 candidates are three chunks
    assert 2 * CHUNK_BYTES // (4 * width) < 2600
    directions = np.zeros((2600, width), np.float32)  # along axes: cosines are exact, and most are equal
    directions[np.arange(2600), draw.integers(20, size=2600)] = draw.choice([-1, 1], 2600)
    queries = draw.integers(-3, 4, (300, width)).astype(np.float32)
    queries[0] = 1
    queries[1] = -np.abs(queries[1])
    found = among(directions).nearest(queries, count)
    cosines = unit(queries).astype(np.float32) @ directions.T
    for row, answers in enumerate(found):
        expected = np.argsort(-cosines[row], kind="stable")[:count]
        assert [int(name) for name, _ in answers] == expected.tolist()
        np.testing.assert_allclose([cosine for _, cosine in answers], cosines[row][expected], atol=1e-6)


@pytest.mark.parametrize(("number", "queries"), [(1, 3), (40_000, 1), (40_000, 300)])
def test_the_nearest_are_those_of_a_brute_force_search(number, queries):
    draw = np.random.default_rng(1)
    directions = unit(draw.standard_normal((number, 576)).astype(np.float32))
    asked = draw.standard_normal((queries, 576)).astype(np.float32)
    expected, cosines = brute_force(asked, directions, 10)
    for row, answers in enumerate(among(directions).nearest(asked, 10)):
        places = [int(name) for name, _ in answers]
        np.testing.assert_allclose(cosines[row][places], cosines[row][expected[row]], atol=1e-6)
        np.testing.assert_allclose([cosine for _, cosine in answers], cosines[row][places], atol=1e-6)


def test_nothing_asked_or_nothing_there_finds_nothing():
    assert among(np.eye(3, dtype=np.float32)).nearest(np.zeros((0, 3), np.float32), 2) == []
    assert among(np.zeros((0, 3), np.float32)).nearest(np.ones((2, 3), np.float32), 2) == [[], []]


def test_a_vectors_file_is_searched_at_the_students_block(student, data):
    vectors = data.vectors
    true = vectors.vectors[:, 0, vectors.layer_index(LAYER)].astype(np.float32)
    texts = ["volcano", "slow cooking"]
    expected, _ = brute_force(student.encode(texts) - student.mean, unit(true - student.mean), 3)
    for asked in (texts, student.encode(texts)):
        found = student.nearest(asked, 3, among=str(SHIPPED))
        places = [[vectors.concepts.index(name) for name, _ in row] for row in found]
        np.testing.assert_array_equal(places, expected)
    [own] = student.nearest(true[[7]], 1, among=SHIPPED)
    assert own == [(vectors.concepts[7], pytest.approx(1, abs=1e-5))]


def test_phrases_are_searched_by_the_students_own_vectors(student):
    phrases = ["a red river", "volcano", " slow cooking ", "volcano"]
    [found] = student.nearest("volcano", 3, among=phrases)
    assert [name for name, _ in found][:2] == ["volcano", "volcano"]
    vectors = student.encode(phrases, normalize_embeddings=True)
    assert found[2][1] == pytest.approx(max(vectors[[0, 2]] @ vectors[1]), abs=1e-5)
    kept = student.candidates(phrases)
    assert student.nearest(student.encode(["volcano"]), 3, kept) == [found]


def changed(vectors, place, /, **changes):
    write_vectors(replace(vectors, **changes), place)
    return place


def test_vectors_files_that_do_not_fit_are_refused(student, data, tmp_path):
    vectors = data.vectors
    shipped = SHIPPED.read_bytes()
    (tmp_path / "cut").write_bytes(shipped[:-100_000])
    (tmp_path / "huge").write_bytes(b"\xff" * 8 + shipped[8:])
    (tmp_path / "text").write_text("volcano\nslow cooking\n")
    (tmp_path / "empty").write_bytes(b"")
    thin = {"vectors": vectors.vectors[..., :9], "token_embeddings": vectors.token_embeddings[:, :9]}
    holes = vectors.vectors.copy()
    holes[3, 0, vectors.layer_index(LAYER), 5] = np.nan
    for place, complaint in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "cut", "damaged, or not a vectors file"),
        (tmp_path / "huge", "damaged, or not a vectors file"),
        (tmp_path / "text", "damaged, or not a vectors file"),
        (tmp_path / "empty", "damaged, or not a vectors file"),
        (changed(vectors, tmp_path / "wide", layers=(1, 2, 4, 6, 16, 22)), "the student's vectors are of block 15"),
        (changed(vectors, tmp_path / "thin", **thin), "vectors of width 9; the student's have 576"),
        (changed(vectors, tmp_path / "holes", vectors=holes), "has values that are not finite; extract"),
    ):
        with pytest.raises(InputError, match=f"vectors file {place}: .*{complaint}"):
            student.nearest("volcano", 2, among=place)


def test_vectors_of_another_teacher_or_prompt_bring_a_warning(student, data, tmp_path, caplog):
    student.candidates(SHIPPED)
    assert not caplog.messages
    other = changed(data.vectors, tmp_path / "other", revision="of another", templates=('"{concept}" is',))
    student.candidates(other)
    assert ["weights" in caplog.messages[0], "prompt" in caplog.messages[1], len(caplog.messages)] == [True, True, 2]


MEASURED = """
import resource, sys
from pipeline import Student
student = Student.load(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
among = sys.argv[2] if sys.argv[2].endswith("s") else open(sys.argv[2]).read().split("\\n")[:-1]
before = peak()
found = student.nearest(["volcano"] * 300, 10, among=among)
print(len(found), len(found[0]), peak() - before)
"""


@pytest.mark.system
@pytest.mark.parametrize("kind", ["vectors", "phrases"])
def test_memory_does_not_grow_with_the_vectors(folder, tmp_path, kind):
    grown = []
    for number in (20_000, 200_000):
        place = tmp_path / f"{number}.{kind}"
        if kind == "phrases":
            place = tmp_path / f"{number}.txt"
            place.write_text("".join(f"thing number {row}\n" for row in range(number)))
        else:
            write_many(place, number)
        command = [sys.executable, "-c", MEASURED, folder, place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        queries, count, megabytes = map(int, done.stdout.split())
        assert (queries, count) == (300, 10)
        grown.append(megabytes)
    # The vectors are 46 and 461 MB; the names of 200,000 concepts and their header are 30 MB.
    assert grown[1] < 200
    assert grown[1] - grown[0] < 60


def write_many(place, number):
    """A vectors file of many random vectors in float32, written in chunks."""
    lists = {"layers": [LAYER], "concepts": [f"thing number {row}" for row in range(number)]}
    lists |= {"categories": ["x"] * number, "splits": ["train"] * number}
    header = read_unverified_header(SHIPPED) | {name: json.dumps(values) for name, values in lists.items()}
    token, tokens = np.zeros(1, np.int64), np.zeros((1, 576), np.float32)

    def chunks():
        draw = np.random.default_rng(0)
        for _ in range(0, number, 20_000):
            yield draw.standard_normal((20_000, 1, 1, 576), np.float32)

    arrays = {"token_ids": np.zeros(number, np.int64), "token_offsets": np.arange(number + 1), "token_vocab": token}
    arrays |= {"token_embeddings": tokens, "token_activations": tokens}
    shape = (number, 1, 1, 576)
    vectors = StreamedTensor("vectors", np.dtype(np.float32), shape, chunks)
    write_streamed(place, header, [*(stream_array(*pair) for pair in arrays.items()), vectors])


def test_folders_of_earlier_versions_that_name_all_concepts_still_load(student, tmp_path):
    replace(student, concepts=(*student.concepts, "one more", "another")).save(tmp_path / "older")
    older = Student.load(tmp_path / "older")
    assert len(older.concepts) == len(older.catalogue.values) + 2
    assert older.nearest(["volcano"], 9) == student.nearest(["volcano"], 9)
    assert len(older.nearest("volcano", 10_000)[0]) == len(student.concepts)
