"""The predict command: whatever goes in comes out as the student's vectors, in every format."""

import csv
import json
import os
import random
import shlex
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHIPPED, fresh_database
from forked import Command
from safetensors.numpy import load_file
from test_lists import damaged, decoded

from pipeline import Student

TEXTS = ["volcano", "slow cooking", 'a "quoted", phrase', "ὕβρις"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student as `train` leaves it."""
    home = tmp_path_factory.mktemp("predict")
    fresh_database(home / "mlflow.db")
    options = ("--vectors", SHIPPED, "--concepts", 60, "--hidden-dim", 8, "--epochs", 1, "--output", home / "student")
    out = Command("train", "--no-report", *options, folder=home).finish()
    assert "answers for any text; test cosine" in out
    return home / "student"


@pytest.fixture
def predicted(folder):
    return Student.load(folder).encode(TEXTS)


def test_texts_as_arguments_come_as_json_lines(workplace, run, folder, predicted):
    code, out, err = run("predict", "--run", folder, *TEXTS)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    np.testing.assert_allclose([line["vector"] for line in lines], predicted, atol=1e-5)


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.safetensors", "vectors.csv", "vectors.jsonl"])
@pytest.mark.parametrize("source", ["texts.txt", "texts.csv"])
def test_files_go_in_and_out(workplace, run, folder, predicted, name, source):
    Path("texts.txt").write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    with Path("texts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["rank", "term"], *([rank, text] for rank, text in enumerate(TEXTS))])
    code, _, err = run("predict", "--run", folder, "--file", source, "--column", "term", "--output", name)
    assert code == 0, err
    if name.endswith(".npy"):
        found = np.load(name)
    elif name.endswith(".safetensors"):
        found = load_file(name)["vectors"]
    elif name.endswith(".csv"):
        rows = list(csv.reader(Path(name).read_text(encoding="utf-8").splitlines()))
        assert [row[0] for row in rows] == ["text", *TEXTS]
        found = np.array([row[1:] for row in rows[1:]], float)
    else:
        found = np.array([json.loads(line)["vector"] for line in Path(name).read_text(encoding="utf-8").splitlines()])
    np.testing.assert_allclose(found, predicted, atol=1e-5)
    assert not list(Path().glob("*.part"))


def give(content, monkeypatch):
    """Put bytes into standard input."""
    Path("given").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", Path("given").open(encoding="ascii"))  # noqa: SIM115 (of a poor locale)


def test_a_text_is_the_same_from_anywhere_in_any_form(workplace, run, folder, predicted, monkeypatch):
    lines = "\n".join(TEXTS)
    table = 'n;"Term "\r\n' + "".join(f'{n};"{text.replace(chr(34), chr(34) * 2)}"\r\n' for n, text in enumerate(TEXTS))
    for place, content in (
        ("-", b"\xef\xbb\xbf" + lines.encode()),
        ("-", lines.encode("utf-16")),
        ("texts.txt", unicodedata.normalize("NFD", lines).replace("\n", "\r").encode("utf-16")),
        ("texts.CSV", table.encode("utf-8-sig")),
        ("texts.tsv", table.replace(";", "\t").encode("utf-16")),
        ("pipe", lines.encode()),
        ("pipe.csv", table.encode()),
    ):
        for output in ((), ("--output", "vectors.JSONL")):
            if place == "-":
                give(content, monkeypatch)
            elif place.startswith("pipe"):
                Path(place).unlink(missing_ok=True)
                os.mkfifo(place)
                threading.Thread(target=Path(place).write_bytes, args=(content,)).start()
            else:
                Path(place).write_bytes(content)
            code, out, err = run("predict", "--run", folder, "--file", place, "--column", "term", *output)
            assert code == 0, err
            text = Path("vectors.JSONL").read_text(encoding="utf-8") if output else out
            found = [json.loads(line) for line in text.splitlines()]
            assert [line["text"] for line in found] == TEXTS
            np.testing.assert_allclose([line["vector"] for line in found], predicted, atol=1e-5)


def test_the_same_word_in_another_unicode_form_is_the_same(folder, data):
    student = Student.load(folder)
    word = "\u1f55\u03b2\u03c1\u03b9\u03c2 caf\u00e9"
    np.testing.assert_array_equal(student.encode(word), student.encode(unicodedata.normalize("NFD", word)))


def test_a_list_without_texts_gives_none(workplace, run, folder, monkeypatch):
    for content in (b"", b"\xef\xbb\xbf\r\n \r\n"):
        for output in ((), ("--output", "none.csv"), ("--output", "none.npy")):
            give(content, monkeypatch)
            assert run("predict", "--run", folder, "--file", "-", *output)[:2] == (0, "")
    assert np.load("none.npy").shape == (0, 576)
    assert Path("none.csv").read_text().startswith("text,v0,v1,")


def test_a_damaged_list_gives_its_vectors_or_one_line(workplace, run, folder, monkeypatch):
    draw = random.Random(0)
    codes = []
    for number in range(24):
        content = damaged(draw)
        lines = decoded(content)
        place = ("-", "list.txt", "list.csv")[number % 3]
        if place == "-":
            give(content, monkeypatch)
        else:
            Path(place).write_bytes(content)
        before = set(Path().iterdir())
        code, out, err = run("predict", "--run", folder, "--file", place, "--output", "vectors.npy")
        codes.append(code)
        assert out == ""
        if code == 0:
            if place != "list.csv":
                assert len(np.load("vectors.npy")) == sum(bool(line.strip()) for line in lines)
            Path("vectors.npy").unlink()
        else:
            assert code == 2
            assert len([line for line in err.splitlines() if line]) == 1
            assert err.startswith(f"error: {'standard input' if place == '-' else f'--file {place}'}, line ")
        assert set(Path().iterdir()) == before
    assert set(codes) == {0, 2}


@pytest.mark.system
@pytest.mark.parametrize(
    ("options", "into", "expected"),
    [
        ((), "| head -1 | cut -c 1-16; exit ${PIPESTATUS[0]}", (0, '{"text": "word 0\n', "")),
        (("--nearest", 2), "> /dev/full", (1, "", "error: cannot write to standard output: No space left on device\n")),
    ],
)
def test_an_output_that_is_closed_or_full_ends_it(workplace, folder, options, into, expected):
    Path("many.txt").write_text("".join(f"word {number}\n" for number in range(2000)))
    command = [sys.executable, "-m", "pipeline", "predict", "--run", folder, "--file", "many.txt", *options]
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(map(str, command))} {into}"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.system
@pytest.mark.parametrize("name", ["", "many.npy"])
def test_standard_input_of_any_length(workplace, run, folder, monkeypatch, name):
    many = "".join(f"word {number}\n" for number in range(20_000))
    Path("many.txt").write_text(many)
    with Path("many.txt").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        code, out, err = run("predict", "--run", folder, "--file", "-", *(["--output", name] if name else []))
    assert code == 0, err
    found = np.load(name) if name else np.array([json.loads(line)["vector"] for line in out.splitlines()])
    assert found.shape == (20_000, 576)
    expected = Student.load(folder).encode(["word 7", "word 19999"])
    assert np.linalg.norm(found[[7, -1]] - expected) < 0.01 * np.linalg.norm(expected)  # 16 bits for very many texts


@pytest.mark.system
def test_the_nearest_concepts_and_the_teachers_own_vectors(workplace, run, folder, vectors):
    known = vectors.concepts[:2]
    code, out, err = run("predict", "--run", folder, "--nearest", 2, "--compare", *known)
    assert code == 0, err
    assert "nearest concepts (cosine)" in out
    assert "vector" in out
    arguments = ("predict", "--run", folder, "--nearest", 2, "--compare", "--output", "all.jsonl", *known)
    code, _, err = run(*arguments)
    assert code == 0, err
    lines = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    student, place = Student.load(folder), vectors.layer_index(15)
    for row, line in enumerate(lines):
        true = vectors.vectors[row, 0, place].astype(np.float32) - student.mean
        answer = student.encode(line["text"]) - student.mean
        expected = answer @ true / np.linalg.norm(answer) / np.linalg.norm(true)
        assert line["cosine"] == pytest.approx(expected, abs=2e-3)
        assert len(line["nearest"]) == 2


def test_the_nearest_among_other_vectors_and_phrases(workplace, run, folder):
    student, phrases = Student.load(folder), ["a red river", "volcano", "slow cooking", "lava"]
    Path("phrases.txt").write_text("\n\n".join(phrases) + "\n")
    Path("phrases.csv").write_text("rank;Concept\n" + "".join(f"1;{phrase}\n" for phrase in phrases))
    for place, among in (("phrases.txt", phrases), ("phrases.csv", phrases), (SHIPPED, SHIPPED)):
        arguments = ("predict", "--run", folder, "--nearest", 2, "--among", place, "--output", "all.jsonl", *TEXTS)
        code, out, err = run(*arguments)
        assert code == 0, err
        found = [json.loads(line)["nearest"] for line in Path("all.jsonl").read_text(encoding="utf-8").splitlines()]
        expected = student.nearest(TEXTS, 2, among=among)
        assert [[name for name, _ in row] for row in found] == [[name for name, _ in row] for row in expected]
    code, out, err = run("predict", "--run", folder, "--nearest", 1, "--among", "phrases.txt", "volcano")
    assert code == 0, err
    assert "nearest (cosine)" in out
    assert "volcano (1.00)" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("a", "--among", "texts.csv"), "--among: expected --nearest too"),
        (("a", "--nearest", 2, "--among", "none.txt"), "--among none.txt: No such file"),
        (("a", "--nearest", 2, "--among", "latin.txt"), "--among latin.txt, line 2: not UTF-8"),
        (("a", "--nearest", 2, "--among", "long.txt"), "--among long.txt, line 3: 10,001 characters"),
        (("a", "--nearest", 2, "--among", "texts.csv"), "--among texts.csv, line 1: expected a header line 'concept'"),
        (("a", "--nearest", 2, "--among", "blank.txt"), "--among blank.txt: no phrases"),
        (("a", "--nearest", 2, "--among", "x.safetensors"), "--among: vectors file x.safetensors: No such file"),
        ((), "expected texts as arguments, or --file"),
        (("a", "--file", "b"), "expected texts as arguments, or --file"),
        (("a", "--output", "x.parquet"), "unknown kind of --output '.parquet'; available: .csv, .jsonl, .npy"),
        (("--file", "none.txt"), "--file none.txt: No such file"),
        (("--file", "binary"), "--file binary, line 1: not UTF-8"),
        (("--file", "latin.txt"), "--file latin.txt, line 2: not UTF-8 text (byte 0xe9, 'é' in Windows-1252); save it"),
        (("--file", "long.txt"), "--file long.txt, line 3: 10,001 characters; expected 10,000 at the most"),
        (("--file", "open.csv"), "--file open.csv, line 2: a quote that is not closed"),
        (("--file", "."), "--file .: Is a directory"),
        (("--file", "texts.csv"), "no column 'concept'; it has rank, term"),
        (("fine", " "), "text 2: empty"),
        (("a", "--run", "nowhere"), "not a student folder"),
        (("a", "--run", "models:/none@best"), "models:/none@best"),
        (("a", "--run", "runs:/none"), "no such run"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(workplace, run, folder, arguments, complaint):
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("latin.txt").write_bytes("ice\ncaf\xe9\n".encode("latin-1"))
    Path("long.txt").write_text("ice\n\n" + "x" * 10_001)
    Path("open.csv").write_text('concept,kind\n"ice,Food\nfire,"Nature"\n')
    Path("texts.csv").write_text("rank,term\n1,a\n")
    Path("blank.txt").write_text(" \n\n")
    if "--run" not in arguments:
        arguments = ("--run", folder, *arguments)
    code, _, err = run("predict", *arguments)
    assert code == 2
    assert complaint in err.splitlines()[-1]
    assert not Path("x.parquet").exists()


@pytest.mark.system
def test_a_student_of_a_run_or_the_newest_one(workplace, run, small_grid):
    assert run("predict", "volcano")[0] == 2
    code, _, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--register", "concepts", "--no-report")
    assert code == 0, err
    [newest] = Path("results").glob("*_student")
    expected = Student.load(newest).encode("volcano")
    [results] = Path("results").glob("*_results_*.json")
    best = json.loads(results.read_text())["best"]["run_id"]
    for arguments in ((), ("--run", newest), ("--run", "models:/concepts@best")):
        code, out, err = run("predict", "volcano", *arguments)
        assert code == 0, err
        np.testing.assert_allclose(json.loads(out)["vector"], expected, atol=1e-4)
    code, _, err = run("predict", "volcano", "--run", f"runs:/{best}")
    assert code == (0 if "volcano" in (ROOT / "data" / "concepts.csv").read_text() else 2), err
