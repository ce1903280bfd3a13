"""evaluate --benchmark and sweep --benchmark on the real teacher and on data that others wrote."""

import json
from pathlib import Path

import gensim
import numpy as np
import pytest
from conftest import SHIPPED
from mlflow import MlflowClient
from scipy.stats import spearmanr

from pipeline.data.dataset import Dataset
from pipeline.data.vectors import read_vectors
from pipeline.extraction.reader import plain_vectors
from pipeline.settings import Cell
from pipeline.student.student import Student
from pipeline.sweep.cells import prepare
from pipeline.teachers.find import find_teacher
from pipeline.teachers.load import load_teacher
from pipeline.teachers.prompts import tokenize

RAW = Path(gensim.__file__).parent / "test/test_data/wordsim353.tsv"
GRID = """fixed: {concepts: 200, epochs: 3, hidden_dim: 32, layers: 1}
axes: {student: [mlp, ridge, truncated, transformer], seed: [0, 1]}
benchmarks: [wordsim353, men]
"""


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def spearman_on_the_raw_file(vectors_of):
    """WordSim-353 by SciPy on the raw file, with a function from words to centred vectors."""
    rows = [line.split("\t") for line in RAW.read_text().splitlines() if not line.startswith("#")]
    words = sorted({word for row in rows for word in row[:2]})
    vectors = dict(zip(words, vectors_of(words).astype(np.float64), strict=True))
    cosines = [vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]) for a, b, _ in rows]
    return spearmanr(cosines, [float(rating) for *_, rating in rows])[0]


@pytest.mark.system
def test_a_sweep_measures_what_its_grid_asks_for(workplace, run, cache, caplog):
    Path("grid.yaml").write_text(GRID)
    code, _, err = run("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED)
    assert code == 0, err
    assert "not measured on men" in caplog.text
    [path] = Path("results").glob("*_results_*Z.json")
    results = json.loads(path.read_text())
    rows = {row["student"]: row for row in results["benchmarks"]["rows"]}
    assert len(rows) == 6 + 4
    assert rows["(teacher)"]["wordsim353_retained"] == 1
    assert rows["(mean, 200 concepts)"]["wordsim353_retained"] == 0
    assert rows["(untrained table)"]["wordsim353_score"] > 0.5
    for cell in results["cells"]:
        logged = MlflowClient().get_run(cell["run_id"]).data.metrics
        assert logged["wordsim353_score"] == pytest.approx(cell["wordsim353_score"])
        assert logged["wordsim353_retained"] == pytest.approx(cell["wordsim353_retained"])
    page = next(Path("results").glob("*_report.html")).read_text()
    assert "Benchmarks" in page
    assert "of the teacher&#39;s score" in page
    assert "WordSim-353" in next(Path("results").glob("*_table.md")).read_text()

    # The teacher's score by SciPy, from vectors that agree with its plain pass of one word at a time.
    [kept] = map(read_vectors, cache.rglob("*.safetensors"))
    data = Dataset(read_vectors(SHIPPED))
    [cell] = prepare([Cell(concepts=200)], data)
    mean, place = data.subset(cell).mean.numpy(), kept.layer_index(15)
    rows_of = {word: row for row, word in enumerate(kept.concepts)}
    of_file = spearman_on_the_raw_file(lambda words: kept.vectors[[rows_of[w] for w in words], 0, place] - mean)
    assert rows["(teacher)"]["wordsim353_score"] == pytest.approx(of_file, abs=1e-6)
    teacher = load_teacher(find_teacher("smollm2-135m", "float32", "cpu"))
    for prompt, row in zip(tokenize(teacher, kept.concepts[:20], "Tell me about {concept}"), range(20), strict=True):
        plain, own = plain_vectors(teacher, prompt, [15], "last")[0].numpy(), kept.vectors[row, 0, place]
        assert np.linalg.norm(plain - own) < 2e-3 * np.linalg.norm(plain)

    # An exported student is measured by what it answers; the teacher's vectors come from the cache.
    code, _, err = run(
        "evaluate", "--run", next(Path("results").glob("*_student")), "--vectors", SHIPPED, "--benchmark", "wordsim353",
        "--benchmark", "simlex999", "--output", "judged",
    )  # fmt: skip
    assert code == 0, err
    judged = json.loads(next(Path("judged").glob("*_benchmarks.json")).read_text())
    student = Student.load(next(Path("results").glob("*_student")))
    expected = spearman_on_the_raw_file(lambda words: student.encode(words) - student.mean)
    assert judged["rows"][-1]["wordsim353_score"] == pytest.approx(expected, abs=1e-6)
    assert 0 < judged["rows"][-1]["retrieval_to_teacher"] <= 1
    assert 0.3 < judged["rows"][-1]["category_to_student"] < judged["rows"][-1]["category_of_teacher"] < 1
    assert "Transfer" in next(Path("judged").glob("*_evaluation_*.md")).read_text()


def test_wrong_benchmarks_are_named_before_anything_runs(workplace, run, cache, small_grid):
    for name, found in (("men", "expected MEN_dataset"), ("wordsim", "unknown benchmark")):
        code, _, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--benchmark", name)
        assert code == 2
        assert found in err
        assert "Traceback" not in err
    assert not Path("results").exists()
