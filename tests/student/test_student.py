"""A student stands alone: any text, the numbers that it was trained with, and nothing hostile gets in."""

import contextlib
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHIPPED
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from vocabularies import find_vocabulary

from pipeline import Student
from pipeline.data.vectors import read_vectors
from pipeline.errors import InputError, WorkError
from pipeline.extraction.vocabulary import fastest_tokenization
from pipeline.settings import Cell
from pipeline.student.folder import FORMAT, _sha256
from pipeline.student.forward import gelu
from pipeline.student.student import BULK
from pipeline.teachers.prompts import tokenize
from pipeline.training.export import checkpoint, export, needs_teacher
from pipeline.training.kinds import KINDS
from pipeline.training.trainer import predict, train_stack

SHORT = Cell(concepts=100, hidden_dim=32, layers=2, epochs=6, batch_size=48, layer=15, precision="float32")
CPU = torch.device("cpu")


def trained(cell, data):
    [result] = train_stack([cell], [data.subset(cell)], CPU)
    return result, checkpoint(cell, result.parameters, data.subset(cell), data, result.metrics)


@pytest.fixture(scope="module")
def vocabulary(vectors):
    return find_vocabulary(vectors, SHIPPED)


@pytest.fixture(scope="module")
def exported(data, vocabulary, tmp_path_factory):
    """A student of the embedded teacher in its folder."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    export(trained(SHORT, data)[1], data, vocabulary).save(folder)
    return folder


@pytest.fixture(scope="module")
def student(exported):
    return Student.load(exported)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_answers_as_it_was_trained(data, tmp_path, kind):
    cell = replace(SHORT, student=kind)
    result, made = trained(cell, data)
    subset, vectors = data.subset(cell), data.vectors
    made.save(tmp_path / "student")
    back = Student.load(tmp_path / "student")
    names = [vectors.concepts[row] for row in subset.test.rows]
    expected = predict(kind, result.parameters, subset.test) + subset.mean
    np.testing.assert_allclose(back.encode(names), expected.numpy(), rtol=1e-4, atol=2e-4)
    assert back.config == made.config | {"format": FORMAT}
    with pytest.raises(InputError, match="'unheard of'"):
        back.encode(["unheard of"])


OPTIONS = [
    {},
    {"skip": True},
    {"student": "ridge"},
    {"student": "kernel"},
    {"student": "transformer"},
    {"inputs": "embeddings-first+ngrams"},
    {"inputs": "embeddings-whitened"},
    {"inputs": "bag"},
    {"inputs": "ngrams", "student": "ridge"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_student_that_needs_no_teacher_answers_for_any_text(data, vocabulary, tmp_path, options):
    cell = replace(SHORT, **options)
    _, made = trained(cell, data)
    alone = export(made, data, vocabulary)
    alone.save(tmp_path / "student")
    back = Student.load(tmp_path / "student")
    assert abs(back.config["metrics"]["test_cosine_lost_to_size"]) < 0.003
    names = list(data.vectors.concepts[:300])
    before, after = (one.encode(names) - one.mean for one in (made, back))
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert np.median(cosines) > 0.999
    answer = back.encode(["an unheard-of thing", "ὕβρις", "2 + 2 = 4"])
    assert answer.shape == (3, 576)
    assert np.isfinite(answer).all()


def test_a_student_that_runs_the_teacher_does_not_stand_alone():
    assert needs_teacher(Cell(student="truncated"))
    assert needs_teacher(Cell(inputs="embeddings+block4"))
    assert not needs_teacher(Cell(student="transformer"))


@pytest.mark.parametrize(
    ("architecture", "template"),
    [("gpt2", "{concept}"), ("llama", "Tell me about {concept}"), ("llama", '"{concept}" is')],
)
def test_students_of_any_teacher_and_template(workplace, run, tiny_folder, template, architecture):
    arguments = ("extract", "--teacher", tiny_folder(architecture), "--layers", "2", "--num-concepts", 120,
                 "--concepts", ROOT / "data" / "concepts.csv", "--template", template, "--output",
                 "tiny.safetensors")  # fmt: skip
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "tiny.vocabulary.safetensors" in out
    code, _, err = run(
        "train", "--vectors", "tiny.safetensors", "--concepts", 40, "--epochs", 2, "--no-report", "--output", "mine"
    )
    assert code == 0, err
    student, vectors = Student.load("mine"), read_vectors(workplace / "tiny.safetensors")
    student.encode(["a phrase never heard"])
    # Its own tokens are those of the file, in whatever way it finds them.
    found = student.tokenization(vectors.concepts)
    np.testing.assert_array_equal(found.values, vectors.token_vocab[vectors.token_rows.values])


@pytest.fixture(scope="module")
def way(vocabulary, vectors):
    return fastest_tokenization(vocabulary, vectors)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30), min_size=1))
def test_tokens_are_those_of_the_teachers_prompt(smollm2, way, texts):
    texts = [text.strip() for text in texts if text.strip()]
    if texts:
        expected = [prompt.concept_ids for prompt in tokenize(smollm2[1], texts, "Tell me about {concept}")]
        found = way(texts)
        assert [found[place].tolist() for place in range(len(texts))] == expected


def test_a_fresh_interpreter_loads_nothing_heavy(exported):
    code = (
        f"import sys; from pipeline import Student; v = Student.load({str(exported)!r}).encode('slow cooking'); "
        "print(v.shape, [m for m in ('torch', 'transformers', 'mlflow', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(576,) []"


def test_size_of_a_folder(data, vocabulary, tmp_path):
    cell = replace(SHORT, hidden_dim=256, epochs=1)
    export(trained(cell, data)[1], data, vocabulary).save(tmp_path / "student")
    assert sum(path.stat().st_size for path in (tmp_path / "student").iterdir()) < 30e6
    card = (tmp_path / "student" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "95 %:" in card


def test_gelu_is_that_of_torch():
    x = np.concatenate([np.linspace(-12, 12, 10001), [0]]).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(gelu(x), expected, atol=1e-6)


def test_one_text_many_texts_and_threads_give_the_same(student):
    texts = [
        f"{first} {second}" for first in ("red", "slow", "İstanbul's", "naïve") for second in ("river", "idea", "x²")
    ]
    together = student.encode(texts * 300, batch_size=64)
    np.testing.assert_allclose(together[: len(texts)], student.encode(texts), atol=1e-4)
    for place, text in enumerate(texts):
        np.testing.assert_allclose(student.encode(text), together[place], atol=1e-4)
    with ThreadPoolExecutor(8) as threads:
        for answer in threads.map(lambda _: student.encode(texts), range(64)):
            np.testing.assert_allclose(answer, together[: len(texts)], atol=1e-4)
    assert student.encode([]).shape == (0, 576)


ALIKE = 1e-6  # of a vector's length: the rounding of float32


def assert_same(found, expected):
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert errors.max() < ALIKE


@pytest.mark.system
@pytest.mark.parametrize("options", [{}, {"student": "ridge"}, {"hidden_dim": 192}, {"hidden_dim": 800}], ids=str)
def test_very_many_texts_get_the_vectors_of_few(data, vocabulary, options):
    alone = export(trained(replace(SHORT, epochs=1, **options), data)[1], data, vocabulary)
    assert alone.features.is_folded == (options.get("hidden_dim") != 800)
    assert ("block0.left" in alone.parameters) == ("hidden_dim" in options)  # a low rank does for the wide ones
    few = [f"{first} {second}" for first in data.vectors.concepts[:60] for second in ("river", "x²", "two\nlines")]
    assert len(few * 120) > BULK
    for unit in (False, True):
        many = alone.encode(few * 120, normalize_embeddings=unit)
        assert_same(many[-len(few) :], np.stack([alone.encode(text, normalize_embeddings=unit) for text in few]))
    assert "_bulk" in vars(alone)


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)
MIXED = st.lists(st.one_of(WORDS, st.sampled_from(["river", "slow cooking", "Ⅷ", "x²", "two\nlines"])), min_size=1)


@pytest.mark.system
@settings(deadline=None, max_examples=40)
@given(MIXED, MIXED, MIXED, st.integers(1, 400), st.integers(1, 40), st.booleans())
def test_a_vector_does_not_depend_on_what_else_is_in_the_call(student, texts, before, after, times, batch_size, many):
    alone = np.stack([student.encode(text) for text in texts])
    others = after * (BULK // len(after) + 1 if many else times)
    among = student.encode([*before, *texts, *others], batch_size=batch_size if not many else 1024)
    assert_same(among[len(before) : len(before) + len(texts)], alone)


def test_it_works_as_a_step_of_scikit_learn(student, vectors):
    chosen = [row for row, category in enumerate(vectors.categories) if category in ("Emotions", "Materials")]
    texts, labels = [vectors.concepts[row] for row in chosen], [vectors.categories[row] for row in chosen]
    steps = make_pipeline(FunctionTransformer(student.encode), LogisticRegression(max_iter=500))
    assert steps.fit(texts[::2], labels[::2]).score(texts[1::2], labels[1::2]) > 0.8
    again = pickle.loads(pickle.dumps(clone(steps)))  # as a grid search does for its processes
    np.testing.assert_array_equal(again[0].transform(texts), student.encode(texts))


def test_directions_and_the_nearest_concepts(student, vectors):
    place = vectors.layer_index(15)
    row = vectors.concepts.index("volcano") if "volcano" in vectors.concepts else 0
    [found] = student.nearest(vectors.vectors[[row], 0, place].astype(np.float32), 3)
    assert found[0][0] == vectors.concepts[row]
    assert found[0][1] > 0.999
    np.testing.assert_allclose(np.linalg.norm(student.encode(["a"], normalize_embeddings=True)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([""], "text 0: empty"),
        (["fine", "  "], "text 1: empty"),
        (["fine", 3], "text 1: expected text, found int"),
        ([None], "found NoneType"),
        (["nul\0l"], "null byte"),
        (["\ud800"], "half a character"),
        (["x" * 10_001], "10,001 characters; expected 10,000 at the most"),
    ],
)
def test_what_is_no_text_is_refused(student, texts, complaint):
    with pytest.raises(InputError, match=complaint):
        student.encode(texts)


def test_a_folder_that_is_no_student_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a student folder"):
        Student.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "student-9"}')
    with pytest.raises(InputError, match="student-9"):
        Student.load(tmp_path)


@pytest.fixture
def hostile(data, tmp_path):
    """A small student, and what writes it again with changes whose checksums are right."""
    cell = replace(SHORT, epochs=1, hidden_dim=8)
    folder = tmp_path / "hostile"
    trained(cell, data)[1].save(folder)

    def change(tensors=None, **config):
        told = json.loads((folder / "config.json").read_text()) | config
        if tensors is not None:
            save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
            digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            told["files"] = told["files"] | {"model.safetensors": digest}
        told["sha256"] = _sha256(told)
        (folder / "config.json").write_text(json.dumps(told))
        return folder

    return change


READING = {"longest": 1, "is_folded": False}


@pytest.mark.parametrize(
    ("tensors", "config", "complaint"),
    [
        (None, {"files": {"../../etc/passwd": "0"}}, "names the file"),
        (None, {"student": "os.system"}, "unknown kind"),
        (None, {"concepts": ["a"]}, "do not fit together"),
        (None, {"concepts": [1] * 2238}, "no texts"),
        (None, {"reading": READING | {"parts": [["token_activations", "mean"]]}}, "fit together"),
        (None, {"reading": READING | {"parts": [["no", "mean"]]}}, "damaged"),
        ({"mean": np.zeros((3, 3), np.float32)}, {}, "fit together"),
        ({"mean": np.full(576, np.nan, np.float32)}, {}, "not finite"),
        ({"mean": np.zeros(576, np.float64)}, {}, "float64"),
        ({"token_rows": np.full(9, 10**12)}, {}, "fit together"),
        ({"tables.token_activations.values": np.zeros((2, 576), np.float16)}, {}, "tables of 2"),
        ({"parameters.out.weight": np.zeros((9, 9), np.float32)}, {}, "fit together"),
    ],
)  # fmt: skip
def test_a_hostile_folder_is_refused_whatever_its_checksums(hostile, tensors, config, complaint):
    with pytest.raises(InputError, match=complaint):
        Student.load(hostile(tensors, **config))


def mutated(content, draw):
    """The bytes with something wrong in them, as a seeded generator chooses."""
    content = bytearray(content)
    where = int(draw.integers(min(len(content), 4096)) if draw.random() < 0.5 else draw.integers(len(content)))
    kind = draw.integers(5)
    if kind == 0:
        content[where] ^= int(draw.integers(1, 256))
    elif kind == 1:
        del content[where:]
    elif kind == 2:
        content[where:where] = draw.bytes(int(draw.integers(1, 64)))
    elif kind == 3:  # another number in the header: lengths, shapes, offsets
        digits = [place for place in range(min(len(content), 4096)) if chr(content[place]).isdigit()]
        place = digits[int(draw.integers(len(digits)))] if digits else where
        content[place : place + 1] = b"9" * int(draw.integers(2, 14))
    else:
        content[:8] = int(draw.integers(1 << 60)).to_bytes(8, "little")
    return bytes(content)


def is_refused_or_right(read, size):
    """Whether reading ends in a clear error or in what was written, within four times the size of the file."""
    tracemalloc.start()
    try:
        answer = read()
    except InputError:
        answer = None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size + (1 << 20)
    return answer


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_students_are_refused_or_read_right(exported, student, tmp_path, name):
    draw = np.random.default_rng(0)
    expected = student.encode(["volcano"])
    size = sum(path.stat().st_size for path in exported.iterdir())
    for _ in range(40):
        folder = tmp_path / "damaged"
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(mutated((exported / name).read_bytes(), draw))
        found = is_refused_or_right(lambda folder=folder: Student.load(folder), size)
        if found is not None:
            np.testing.assert_array_equal(found.encode(["volcano"]), expected)


def test_damaged_tokenizers_do_no_harm_whatever_their_checksums(exported, tmp_path):
    draw = np.random.default_rng(1)
    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    told = json.loads((folder / "config.json").read_text())
    for _ in range(30):
        content = mutated((exported / "tokenizer.json").read_bytes(), draw)
        (folder / "tokenizer.json").write_bytes(content)
        told["files"]["tokenizer.json"] = hashlib.sha256(content).hexdigest()
        told["sha256"] = _sha256(told)
        (folder / "config.json").write_text(json.dumps(told))
        with contextlib.suppress(InputError):
            Student.load(folder).encode(["volcano"])


def test_damaged_vectors_files_are_refused_or_read_right(vectors, tmp_path, workplace, run, tiny_folder):
    code, _, err = run("extract", "--teacher", tiny_folder("gpt2"), "--layers", "2", "--num-concepts", 40,
                       "--concepts", ROOT / "data" / "concepts.csv", "--output", "tiny.safetensors")  # fmt: skip
    assert code == 0, err
    content = (workplace / "tiny.safetensors").read_bytes()
    expected = read_vectors(workplace / "tiny.safetensors").vectors
    draw = np.random.default_rng(2)
    path = tmp_path / "damaged.safetensors"
    for _ in range(300):
        path.write_bytes(mutated(content, draw))
        found = is_refused_or_right(lambda: read_vectors(path), len(content))
        if found is not None:
            np.testing.assert_array_equal(found.vectors, expected)


def test_the_readme_of_a_folder_can_be_edited(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("# Mine\n")
    assert Student.load(tmp_path / "mine").card == "# Mine\n"
    (tmp_path / "mine" / "README.md").unlink()
    assert Student.load(tmp_path / "mine").card == ""


def test_a_student_that_would_not_load_again_is_not_left(data, tmp_path):
    _, made = trained(replace(SHORT, epochs=1, hidden_dim=8), data)
    with pytest.raises(WorkError, match="would not load again"):
        replace(made, mean=made.mean[:5]).save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_student_too_large_to_load_is_not_left(data, tmp_path):
    _, made = trained(replace(SHORT, epochs=1, hidden_dim=8), data)
    with pytest.raises(WorkError, match=r"would not load again \(config.json has 9,.* bytes; expected 8,388,608"):
        replace(made, concepts=("x" * 9_000_000, *made.concepts[1:])).save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
