"""Scores and shares against independent computations, and what the extremes retain."""

import functools
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score
from sklearn.metrics.cluster import contingency_matrix

from pipeline.benchmarks import catalogue, readers
from pipeline.benchmarks.retention import measure
from pipeline.benchmarks.tasks import Analogies, Attributes, Categories, Ratings, Similarity, weighted_correlation
from pipeline.benchmarks.transfer import rating_transfer
from pipeline.errors import InputError
from pipeline.storage import sha256_of

DRAW = np.random.default_rng(0)
WORDS = tuple(f"{first}{second}{third}" for first in "bdgklm" for second in "aeiou" for third in "bdgklm")  # 180
VECTORS = DRAW.standard_normal((len(WORDS), 24))
RATED = VECTORS @ DRAW.standard_normal((24, 3)) + 2 * DRAW.standard_normal((len(WORDS), 3))
PAIRS = np.stack([DRAW.permutation(90 * 90)[:400] // 90, 90 + DRAW.permutation(90 * 90)[:400] % 90], 1)


def similarity():
    lengths = np.linalg.norm(VECTORS, axis=1)
    cosines = (VECTORS[PAIRS[:, 0]] * VECTORS[PAIRS[:, 1]]).sum(1) / lengths[PAIRS[:, 0]] / lengths[PAIRS[:, 1]]
    return Similarity(WORDS, PAIRS, np.round(10 * cosines + 2 * np.random.default_rng(1).standard_normal(400)))


def analogies():
    places = np.random.default_rng(2).permuted(np.tile(np.arange(4), (60, 1)), axis=1)
    return Analogies(WORDS, places + 4 * np.random.default_rng(2).integers(40, size=(60, 1)))


def categories():
    return Categories(WORDS, np.arange(len(WORDS)) % 5)


def attributes():
    return Attributes(WORDS, RATED > 1)


def grouped_vectors():
    return VECTORS + 4 * np.eye(24)[categories().labels]


def parallel_vectors():
    """Vectors in which four neighbours are the corners of a parallelogram."""
    corners = np.stack([np.zeros(24), np.eye(24)[0], np.eye(24)[1], np.eye(24)[0] + np.eye(24)[1]])
    return np.repeat(VECTORS[:45], 4, axis=0) + 3 * np.tile(corners, (45, 1))


TASKS = {
    "similarity": (similarity, VECTORS),
    "categories": (categories, grouped_vectors()),
    "ratings": (lambda: Ratings(WORDS, RATED), VECTORS),
    "attributes": (attributes, VECTORS),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_teacher_retains_all_a_constant_nothing_and_shuffled_words_nothing_but_chance(name):
    make, teacher = TASKS[name]
    shuffled = [np.random.default_rng(seed).permutation(teacher) for seed in range(8)]
    subjects = {"teacher": [teacher], "constant": [np.zeros((len(WORDS), 8))], "shuffled": shuffled[1:2]}
    found = measure(make(), teacher, subjects | {"often": shuffled})
    assert found["teacher"].retained == pytest.approx(1, abs=1e-12)
    assert found["teacher"].retained_low == pytest.approx(1) == found["teacher"].retained_high
    assert found["constant"].retained == pytest.approx(0, abs=1e-12)
    assert found["shuffled"].retained_low < 0 < found["shuffled"].retained_high
    assert abs(found["often"].retained) < 0.1
    assert found["teacher"].score_low < found["teacher"].score < found["teacher"].score_high


def test_analogies_of_parallelograms_are_right_and_those_of_constants_are_not():
    places = 4 * np.arange(45)[:, None] + np.arange(4)
    task, vectors = Analogies(WORDS, places), parallel_vectors()
    found = measure(task, vectors, {"teacher": [vectors], "constant": [0 * vectors], "shuffled": [vectors[::-1]]})
    assert found["teacher"].score > 0.9
    assert (found["teacher"].retained, found["constant"].retained) == (1, 0)


def test_scores_equal_those_of_scipy_and_scikit_learn():
    ones = np.ones((1, 400))
    task = similarity()
    left, right = VECTORS[PAIRS[:, 0]], VECTORS[PAIRS[:, 1]]
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    [score] = task.score(task.answers(VECTORS), ones)
    assert score == pytest.approx(spearmanr(cosines, task.ratings)[0], abs=1e-9)
    clusters = categories().answers(grouped_vectors())
    table = contingency_matrix(categories().labels, clusters[:, 0])
    purity = table.max(0).sum() / table.sum()
    assert categories().score(clusters, ones[:, : len(WORDS)])[0] == pytest.approx(purity)
    said = attributes().answers(VECTORS)
    expected = f1_score(attributes().has, said.astype(bool), average="macro")
    assert attributes().score(said, ones[:, : len(WORDS)])[0] == pytest.approx(expected)


def test_weights_are_counts_of_items():
    x, y, counts = DRAW.standard_normal((20, 2)), DRAW.standard_normal((20, 2)), DRAW.integers(0, 4, 20)
    rows = np.repeat(np.arange(20), counts)
    found = weighted_correlation(x, y, counts[None].astype(float))[0]
    assert found == pytest.approx([pearsonr(x[rows, column], y[rows, column])[0] for column in range(2)])


def test_seeds_are_averaged_and_a_teacher_without_skill_gives_no_share():
    noisy = VECTORS + DRAW.standard_normal(VECTORS.shape)
    found = measure(similarity(), VECTORS, {"both": [VECTORS, noisy], "one": [noisy]})
    assert found["both"].score == pytest.approx((found["both"].scores[0] + found["one"].score) / 2)
    assert found["both"].shares == [pytest.approx(1), pytest.approx(found["one"].retained)]
    useless = measure(similarity(), np.random.default_rng(9).standard_normal(VECTORS.shape), {"one": [VECTORS]})
    assert useless["one"].retained is None
    assert useless["one"].score > 0.5


def test_a_probe_of_words_is_asked_about_phrases():
    task = Ratings(WORDS, RATED, only_fitted=120)
    answers = task.answers(VECTORS)
    assert answers.shape == (60, 3)
    assert len(task.item_phrases) == 60
    assert task.score(answers, np.ones((1, 60)))[0] > 0.5
    assert len(task.without(np.arange(10)).phrases) == 170


@pytest.mark.parametrize("only_fitted", [0, 120])
def test_a_probe_of_ratings_transfers_to_like_vectors_and_not_to_others(only_fitted):
    task = Ratings(WORDS, RATED, only_fitted)
    own = task.score(task.answers(VECTORS), np.ones((1, len(WORDS) - only_fitted)))[0]
    assert rating_transfer("r", task, VECTORS, VECTORS) == {"r_to_student": own, "r_to_teacher": own}
    others = rating_transfer("r", task, VECTORS, np.random.default_rng(5).standard_normal(VECTORS.shape))
    assert all(abs(score) < 0.25 < own for score in others.values())
    assert rating_transfer("s", similarity(), VECTORS, VECTORS) == {}


def test_words_of_one_stem_are_in_one_fold():
    task = Ratings((*WORDS, "walk", "walks", "walking", "walked"), np.ones((len(WORDS) + 4, 1)))
    assert len(set(task.folds[-4:])) == 1
    assert len(set(task.folds)) == 5


FILES = {
    "wordsim353": ("combined.csv", "Word 1,Word 2,Human (mean)\nlove,sex,6.77\ntiger,cat,7.35\n", 2),
    "simlex999": ("SimLex-999.txt", "word1\tword2\tPOS\tSimLex999\told\nold\tnew\tA\t1.58\n", 1),
    "men": ("MEN_dataset_natural_form_full", "sun sunlight 50.0\nriver water 49\n", 2),
    "simverb3500": ("SimVerb-3500.txt", "take\tremove\tV\t6.81\tSYNONYMS\n", 1),
    "rarewords": ("rw.txt", "squishing\tsquirt\t5.88\t7\t8\n", 1),
    "google-analogies": ("questions-words.txt", ": capitals\nAthens Greece Oslo Norway\n", 1),
    "ap": ("ap.tsv", "dog\tanimal\ncat\tanimal\noak\ttree\n", 3),
    "concreteness": ("Concreteness_ratings_Brysbaert_et_al_BRM.txt", "Word\tConc.M\nroad\t4.9\nhope\t1.2\n", 2),
    "concreteness-phrases": ("concreteness.csv", "Word,Concreteness\nroad,4.9\nice cream,5\n", 1),
    "sensorimotor": ("sensorimotor_norms.csv", "Word,Visual,Auditory\na,2.4,2.2\nb,1,0\n", 2),
    "mcrae": ("mcrae.csv", "Concept,Feature\n" + "".join(f"c_{n},f{n % 2}\n" for n in range(30)), 30),
    "ravel": (
        "ravel_city_entity_attributes.json",
        "{" + ",".join(f'"City {n}": {{"Continent": "{"AE"[n % 2]}"}}' for n in range(24)) + "}", 24,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_files_that_people_have_are_read(tmp_path, name):
    file, text, items = FILES[name]
    (tmp_path / file).write_text(text)
    task = catalogue.load(name, str(tmp_path))
    assert len(task.item_phrases) == items
    assert len(set(task.phrases)) == len(task.phrases)


def test_a_folder_with_a_file_per_category_is_read(tmp_path):
    for category, words in {"animal": "dog\ncat\n", "tree": "oak\n"}.items():
        path = tmp_path / "EN-BLESS" / f"{category}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(words)
    task = catalogue.load("bless", str(tmp_path))
    assert dict(zip(task.phrases, task.labels, strict=True)) == {"dog": 0, "cat": 0, "oak": 1}


@pytest.mark.parametrize(
    ("read", "text", "found"),
    [
        (readers.read_similarity, "a\tb\t1\nc\td\n", "line 2: expected two words and a rating"),
        (readers.read_similarity, "# nothing\n", "no pairs of words"),
        (readers.read_analogies, "a b c\n", "line 1: expected four words"),
        (readers.read_categories, "dog\n", "line 1: expected a word and its category"),
        (readers.read_features, "Concept,Colour\ncar,red\n", "expected a column Feature or feature"),
        (readers.read_entities, "[]", "expected an object of entities"),
    ],
)
def test_wrong_files_are_named_in_one_line(tmp_path, read, text, found):
    path = tmp_path / "file.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=found):
        read(path)


def test_what_packages_carry_is_found_and_what_is_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(catalogue.load("wordsim353").pairs) == 353
    assert len(catalogue.load("simlex999").pairs) == 999
    assert len(catalogue.load("google-analogies").questions) == 19544
    with pytest.raises(InputError, match=r"expected MEN_dataset_natural_form_full or men\.txt, from https"):
        catalogue.load("men")
    with pytest.raises(InputError, match=r"--benchmark-data .*: no file of wordsim353"):
        catalogue.load("wordsim353", str(tmp_path))
    with pytest.raises(InputError, match="benchmark"):
        catalogue.parse_names(["wordsim"])


@pytest.fixture
def served(tmp_path):
    """A folder, and the address at which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("content", [b"love\tsex\t6.77\n", b"another file"])
def test_a_download_is_kept_only_with_the_right_checksum(tmp_path, monkeypatch, content, served):
    folder, address = served
    (folder / "wordsim353.tsv").write_bytes(b"love\tsex\t6.77\n")
    right = sha256_of(folder / "wordsim353.tsv")
    (folder / "wordsim353.tsv").write_bytes(content)
    known = replace(catalogue.BENCHMARKS["wordsim353"], package=("", ""), url=f"{address}/wordsim353.tsv", sha256=right)
    monkeypatch.setitem(catalogue.BENCHMARKS, "wordsim353", known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = Path(tmp_path, "activation-distillation", "benchmarks", "wordsim353.tsv")
    if content.startswith(b"love"):
        assert len(catalogue.load("wordsim353").pairs) == 1
        assert kept.is_file()
    else:
        with pytest.raises(InputError, match="cannot be downloaded"):
            catalogue.load("wordsim353")
        assert not kept.exists()
