"""The predict command: whatever goes in comes out as the student's vectors, in every format."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHIPPED
from safetensors.numpy import load_file

from pipeline import Student

TEXTS = ["volcano", "slow cooking", 'a "quoted", phrase', "ὕβρις"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student as `train` leaves it."""
    home = tmp_path_factory.mktemp("predict")
    command = [sys.executable, "-m", "pipeline", "train", "--no-report",
               "--vectors", SHIPPED, "--concepts", "60", "--hidden-dim", "8",
               "--epochs", "1", "--output", home / "student"]  # fmt: skip
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "answers for any text; test cosine" in done.stdout
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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "expected texts as arguments, or --file"),
        (("a", "--file", "b"), "expected texts as arguments, or --file"),
        (("a", "--output", "x.parquet"), "unknown kind of --output '.parquet'; available: .csv, .jsonl, .npy"),
        (("--file", "none.txt"), "--file none.txt: No such file"),
        (("--file", "binary"), "not UTF-8"),
        (("--file", "texts.csv"), "no column 'concept'; it has rank, term"),
        (("fine", " "), "text 2: empty"),
        (("a", "--run", "nowhere"), "not a student folder"),
        (("a", "--run", "models:/none@best"), "models:/none@best"),
        (("a", "--run", "runs:/none"), "no such run"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(workplace, run, folder, arguments, complaint):
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("texts.csv").write_text("rank,term\n1,a\n")
    if "--run" not in arguments:
        arguments = ("--run", folder, *arguments)
    code, _, err = run("predict", *arguments)
    assert code == 2
    assert complaint in err.splitlines()[-1]
    assert not Path("x.parquet").exists()


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
