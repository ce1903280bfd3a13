"""The evaluate command measures students wherever they are, and writes its tables."""

from pathlib import Path

from conftest import SHIPPED


def test_evaluate_measures_a_student_folder(workplace, run):
    common = ("--vectors", SHIPPED)
    assert run("train", *common, "--concepts", 40, "--student", "ridge", "--no-report", "--output", "mine")[0] == 0
    code, out, err = run("evaluate", "--run", "mine", *common)
    assert code == 0, err
    assert "KL" not in out
    [table] = Path("results").glob("mine_evaluation_*.md")
    text = table.read_text()
    assert "| c40-ridge-s0 | 1 |" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Test concepts",
        "## Test cosine by category",
        "## Test cosine by tokens",
        "## Test cosine by frequency",
    ]
    assert run("evaluate", "--run", "no-such-run", *common)[0] == 2
