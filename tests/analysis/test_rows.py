"""What a cell is: every field tells it apart, in its name, its group, its row, its label and its baselines."""

import json
import random
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHIPPED
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from pipeline import Student
from pipeline.analysis.export_choice import best_exportable
from pipeline.analysis.results import sections
from pipeline.analysis.rows import (
    BASELINE_FIELDS,
    CELL_FIELDS,
    baseline_key,
    baseline_labeller,
    by_configuration,
    cell_of,
    labeller,
    ridge_baseline,
)
from pipeline.analysis.tables import cell_table, configuration_table, terminal_table
from pipeline.commands.find_sweep import load_sweep
from pipeline.commands.results_file import add_cosines, cosines_file, read_results
from pipeline.settings import Cell
from pipeline.sweep.cells import cell_key, prepare
from pipeline.training.kinds import KINDS

SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5])
POSITIVE = st.floats(1e-5, 2, allow_nan=False)
VALUES = {
    "concepts": st.integers(2, 3000),
    "hidden_dim": st.integers(1, 2048),
    "layers": st.integers(0, 12),
    "student": st.sampled_from(list(KINDS)),
    "objective": st.sampled_from(["cosine", "mse", "infonce", "cosine+0.1*infonce", "cosine+0.2*infonce", "2*mse"]),
    "layer": st.integers(0, 80),
    "epochs": st.integers(1, 5000),
    "seed": st.integers(0, 99),
    "batch_size": st.integers(1, 512),
    "learning_rate": POSITIVE,
    "weight_decay": POSITIVE,
    "dropout": SHARES,
    "inputs": st.sampled_from(["activations", "embeddings", "embeddings-first", "ngrams", "bag", "embeddings+block4"]),
    "blocks": st.integers(0, 12),
    "skip": st.booleans(),
    "temperature": POSITIVE,
    "targets": st.sampled_from(["first", "mean", "all"]),
    "token_dropout": SHARES,
    "noise": POSITIVE,
    "mixup": POSITIVE,
    "curriculum": st.sampled_from(["none", "frequency", "ridge"]),
    "pace": POSITIVE,
    "split": st.sampled_from(["concepts", "categories"]),
    "evaluations": st.sampled_from(["every", "log"]),
    "patience": st.none() | st.integers(1, 50),
    "precision": st.sampled_from(["auto", "float32", "bfloat16"]),
}
CELLS = st.builds(Cell, **VALUES)


def row_of(cell, value=0.5):
    numbers = {"parameters": 10, "flops": 20.0, "train_seconds": 1.0}
    cosines = dict.fromkeys(("val_cosine", "test_cosine", "test_cosine_raw", "test_r2"), value)
    cosines |= dict.fromkeys(("test_retrieval_at_1", "test_retrieval_at_5"), value)
    curves = {"epoch": [1], "val_cosine": [value]}
    return asdict(cell) | {"name": cell.name, "run_id": cell.name, "curves": curves} | numbers | cosines | {
        "test_cosines": [value, value / 2]
    }  # fmt: skip


def results_of(cells, values=None, floor=0.1):
    """A results file's content for cells that were never trained, their baselines below them."""
    rows = [row_of(cell, value) for cell, value in zip(cells, values or [0.5] * len(cells), strict=True)]
    baselines = []
    for ridge in dict.fromkeys(map(ridge_baseline, cells)):
        for student, value in (("nearest", floor - 0.1), ("ridge", floor)):
            own = {name: getattr(ridge, name) for name in BASELINE_FIELDS} | {"student": student}
            known = {name: row_of(ridge, value)[name] for name in row_of(ridge) if name.startswith(("val_", "test_"))}
            baselines.append(own | known)
    return {"grid": "g", "teacher": "t", "cells": rows, "baselines": baselines}


def test_the_values_cover_every_field():
    assert set(VALUES) == set(CELL_FIELDS)


@pytest.mark.parametrize("field", CELL_FIELDS)
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_two_values_of_a_field_are_two_of_everything(field, data):
    one, other = data.draw(st.lists(VALUES[field], min_size=2, max_size=2, unique=True))
    base = data.draw(CELLS)
    cells = [replace(base, **{field: value}) for value in (one, other)]
    assert cells[0].name != cells[1].name
    content = results_of(cells)
    assert len(by_configuration(content["cells"])) == (1 if field == "seed" else 2)
    parts = sections(content)
    assert len(parts) == (2 if field in ("layer", "split") else 1)
    if len(parts) == 2:
        assert len({part.title for part in parts}) == len({part.suffix for part in parts}) == 2
        assert {part.results[field] for part in parts} == {one, other}
        for part in parts:
            [row] = part.results["cells"]
            assert row == part.results["best"]
            assert {baseline[field] for baseline in part.results["baselines"]} == {row[field]}
        return
    [part] = parts
    for head, table in (cell_table(part.results), terminal_table(part.results)):
        told = head.index("parameters")
        own = [tuple(row[:told]) for row in table if not row[0].startswith("(")]
        assert len(set(own)) == 2
        assert head[0] != "student" or field == "student" or field in head
    head, table = configuration_table(part.results)
    own = [tuple(row[: head.index("parameters")]) for row in table if not row[0].startswith("(")]
    assert len(set(own)) == len(own) == (1 if field == "seed" else 2)
    labels = {labeller(content["cells"])(row) for row in content["cells"]}
    assert len(labels) == (1 if field in ("concepts", "seed") else 2)  # an axis, and a band
    keys = {baseline_key(row) for row in content["cells"]}
    reads = "inputs" in KINDS[base.student].reads
    if field == "student":
        assert len(keys) in (1, 2)  # a transformer reads no inputs
    else:
        assert len(keys) == (2 if field in BASELINE_FIELDS and (field != "inputs" or reads) else 1)


@settings(deadline=None, max_examples=300)
@given(CELLS, CELLS)
def test_cells_with_one_name_are_one_cell(one, other):
    assert (one == other) == (one.name == other.name)


@settings(deadline=None, max_examples=50)
@given(st.lists(CELLS, min_size=1, max_size=4), st.integers(0, 2**31))
def test_groups_are_those_of_a_plain_recomputation(bases, seed):
    draw = random.Random(seed)
    cells = list(dict.fromkeys(replace(base, seed=number) for base in bases for number in range(3)))
    draw.shuffle(cells)
    values = [draw.random() for _ in cells]
    content = results_of(cells, values)
    for part in sections(content):
        rows = [row for row in content["cells"] if (row["layer"], row["split"]) == (part.results["layer"],
                                                                                    part.results["split"])]  # fmt: skip
        expected = []
        for row in rows:
            same = [o for o in rows if all(o[name] == row[name] for name in CELL_FIELDS if name != "seed")]
            if row is same[0]:
                expected.append((len(same), f"{np.mean([o['test_cosine'] for o in same]):.3f}"))
        head, table = configuration_table(part.results)
        places = [head.index("seeds"), head.index("test cosine")]
        found = [tuple(row[place] for place in places) for row in table if not row[0].startswith("(")]
        assert sorted(found) == sorted((str(seeds), value) for seeds, value in expected)
        assert part.results["best"] == max(rows, key=lambda row: row["val_cosine"])


def test_the_name_of_a_cell_of_defaults_is_short():
    assert Cell().name == "c700-h256-l2-s0"
    assert Cell(student="ridge").name == "c700-ridge-s0"
    assert Cell(student="truncated", blocks=4).name == "c700-truncated4-s0"
    assert Cell(layer=6, learning_rate=0.001, epochs=5).name == "c700-h256-l2-layer6-e5-lr0.001-s0"


def test_the_middle_block_is_the_default_and_one_cell_whether_named_or_not(data):
    cells = prepare([Cell(), Cell(layer=15), Cell(layer=6)], data)
    assert [cell.layer for cell in cells] == [15, 6]
    assert [data.omit_default(cell).name for cell in cells] == ["c700-h256-l2-s0", "c700-h256-l2-layer6-s0"]


def test_a_whole_number_and_the_same_float_are_one_cell():
    one, other = Cell(weight_decay=0, temperature=1), Cell(weight_decay=0.0, temperature=1.0)
    assert (one.name, cell_key(one, "v", "float32")) == (other.name, cell_key(other, "v", "float32"))


def test_a_baseline_reads_what_its_cell_reads():
    assert ridge_baseline(Cell(inputs="embeddings", targets="mean", seed=3)) == Cell(
        student="ridge", inputs="embeddings", targets="mean"
    )
    assert ridge_baseline(Cell(student="truncated", inputs="embeddings", blocks=4)).inputs == "embeddings"
    rows = results_of([Cell(inputs=inputs) for inputs in ("embeddings", "activations")])["baselines"]
    assert len(set(map(baseline_labeller(rows), rows))) == len(rows)


def test_the_student_that_is_left_is_the_best_on_validation_whatever_its_kind():
    def chosen(content, **options):
        [part] = sections(content)
        return best_exportable(part.results, **options)

    mlp, wide, truncated = Cell(layer=15), Cell(layer=15, hidden_dim=512), Cell(layer=15, student="truncated")
    content = results_of([mlp, wide], [0.70, 0.71], floor=0.76)
    choice = chosen(content)
    assert (choice.row["student"], "run_id" in choice.row) == ("ridge", False)
    assert choice.reason == (
        f"ridge regression on 700 concepts, validation cosine 0.760; the best trained student, mlp {wide.name}, has "
        "0.710"
    )
    assert chosen(content, baselines=False).row["name"] == wide.name
    for row in content["cells"]:
        row["test_cosine"] = 0.99  # test does not choose
    assert chosen(content).row["student"] == "ridge"
    choice = chosen(results_of([mlp, wide], [0.70, 0.71], floor=0.5))
    assert choice.row["name"] == wide.name
    assert choice.reason.endswith("the best student of another kind, ridge regression on 700 concepts, has 0.500")
    choice = chosen(results_of([mlp, truncated], [0.7, 0.9], floor=0.5))
    assert choice.row["name"] == mlp.name
    assert choice.reason.endswith(f"truncated {truncated.name} has 0.900, but runs blocks of the teacher")
    content = results_of([mlp], [0.5], floor=0.6)
    content["baselines"][0]["val_cosine"] = 0.8
    assert chosen(content).reason.endswith("the nearest training concept on 700 concepts has 0.800, but is no student")


class Tables(HTMLParser):
    """The rows of every table of a page, by the heading before it, ``(section, title)``."""

    def __init__(self, text):
        super().__init__()
        self.rows, self._at, self._path, self._tag = {}, None, ["", ""], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        if tag == "tr":
            self.rows.setdefault(tuple(self._path), []).append([])
        elif tag in ("td", "th"):
            self.rows[tuple(self._path)][-1].append("")

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        if self._tag in ("h1", "h2"):
            self._path[self._tag == "h2"] = data
        elif self._tag in ("td", "th"):
            self.rows[tuple(self._path)][-1][-1] += data


def markdown_tables(text):
    """The tables of a Markdown page: lists of rows."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block if "---" not in line]
            for block in blocks if block[0].startswith("|")]  # fmt: skip


def told_apart(head, rows, until):
    """The rows, where the columns before the first number tell each from the others."""
    own = [tuple(row[: head.index(until)]) for row in rows]
    assert len(set(own)) == len(own), own
    return own


def terminal_tables(text):
    """The tables that a command printed: of each its lines of rows, which begin after the rule."""
    assert max(map(len, text.splitlines())) < 400
    found, rows = [], None
    for line in text.splitlines():
        if re.fullmatch(r"\s*─+\s*", line):
            rows = []
            found.append(rows)
        elif rows is not None and line.strip() and re.match(r"\S", line) and not line.startswith("Best cell"):
            rows.append(re.split(r"\s{1,}", line.strip()))
        else:
            rows = None
    return found


LAYERS = """
fixed: {concepts: 60, hidden_dim: 8, epochs: 2, batch_size: 32}
axes: {layer: [6, 15, 22], learning_rate: [0.001, 0.002]}
"""


@pytest.mark.system
def test_a_grid_over_layers_compares_within_a_block_only(workplace, run, data):
    Path("blocks.yaml").write_text(LAYERS)
    code, out, err = run("sweep", "--grid", "blocks.yaml", "--vectors", SHIPPED, "--sweep-id", "blocks")
    assert code == 0, err
    [path] = Path("results").glob("*_results_*Z.json")
    content = json.loads(path.read_text())
    assert (content["best"], content["fit"], content["layer"]) == (None, None, None)
    assert [part["layer"] for part in content["sections"]] == [6, 15, 22]
    for part in content["sections"]:
        own = [row for row in content["cells"] if row["layer"] == part["layer"]]
        assert len(own) == 2
        assert part["best"] == max(own, key=lambda row: row["val_cosine"])

    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("activation-distillation").experiment_id])
    [parent] = [one for one in found if one.data.tags.get("role") == "sweep"]
    names = {one.info.run_name for one in found if one.data.tags.get("role") == "cell"}
    assert names == {
        f"c60-h8-l2{layer}-e2-b32{rate}-s0" for layer in ("-layer6", "", "-layer22") for rate in ("-lr0.001", "")
    }
    for part in content["sections"]:
        metric = f"best_val_cosine_layer{part['layer']}"
        assert parent.data.metrics[metric] == pytest.approx(part["best"]["val_cosine"])
        assert parent.data.tags[f"best_cell_layer{part['layer']}"] == part["best"]["name"]
    assert "best_val_cosine" not in parent.data.metrics
    assert len(parent.outputs.model_outputs) == 3

    # The page, the table and the terminal.
    markdown = Path("results", f"{path.stem}_table.md").read_text()
    assert re.findall(r"^## (.*)", markdown, re.MULTILINE) == ["Block 6", "Block 15", "Block 22"]
    tables = markdown_tables(markdown)
    assert len(tables) == 6
    for head, *rows in tables:
        assert "layer" not in head
        assert "hidden_dim" not in head
        told_apart(head, rows, "parameters")
        assert [row[1] for row in rows if row[0] == "mlp"].count("0.001") == 1
    for head, *rows in tables[::2]:
        assert {row[head.index("seeds")] for row in rows if row[0] == "mlp"} == {"1"}
    page = Tables(Path("results", f"{path.stem}_report.html").read_text()).rows
    for part in content["sections"]:
        for title in ("Configurations", "Cells"):
            head, *rows = page[f"Block {part['layer']}", title]
            told_apart(head, rows, "parameters")
            assert "learning_rate" in head
    shown = terminal_tables(out)
    assert [len(rows) for rows in shown] == [5, 5, 5]
    for rows in shown:
        assert len({tuple(row[:2]) for row in rows}) == 5
    assert all(f"block {layer}:" in out for layer in (6, 15, 22))

    # Each block leaves a student of its own, and no other.
    folders = sorted(folder.name for folder in Path("results").glob("*_student"))
    assert folders == sorted(f"{path.stem}_layer{layer}_student" for layer in (6, 15, 22))
    for folder in folders:
        assert f"_layer{Student.load(Path('results') / folder).config['layer']}_" in folder
    code, _, err = run("predict", "volcano", "--run", f"runs:/{parent.info.run_id}")
    assert code == 2
    assert "several logged students" in err
    code, _, err = run("predict", "volcano")
    assert code == 2
    assert all(f"results/{folder}" in err for folder in folders)
    _, again, students = load_sweep(None, "blocks")
    whole = read_results(path)
    add_cosines(whole, path.with_name(cosines_file(path.stem)))
    assert again == whole
    for student, part in zip(students, content["sections"], strict=True):
        assert student.config["cell"] == asdict(cell_of(part["best"]))
    code, _, err = run("evaluate", "--run", parent.info.run_id, "--vectors", SHIPPED)
    assert code == 0, err
    [table] = Path("results").glob("*_evaluation_*.md")
    head, *rows = markdown_tables(table.read_text())[0]
    told_apart(head, rows, "seeds")
    assert len([row for row in rows if not row[0].startswith("(")]) == 6


@pytest.mark.system
def test_the_baseline_grid_on_another_teacher_tells_every_row_apart(workplace, run, tiny_folder):
    grid = (ROOT / "pipeline" / "grids" / "baseline.yaml").read_text()
    grid = grid.replace("concepts: 700", "concepts: 60").replace("epochs: 100", "epochs: 2")
    grid = "\n".join(line for line in grid.splitlines() if not re.search("blocks: [46]", line))
    Path("baseline.yaml").write_text(grid)
    code, _, err = run("extract", "--teacher", tiny_folder("gpt2"), "--layers", "1,2,3", "--num-concepts", 150,
                       "--concepts", ROOT / "data" / "concepts.csv", "--output", "tiny.safetensors")  # fmt: skip
    assert code == 0, err
    # The block in the middle has one early block only; the last has both.
    Path("baseline.yaml").write_text(grid.replace("fixed:", "fixed:\n  layer: 3"))
    code, out, err = run("sweep", "--grid", "baseline.yaml", "--vectors", "tiny.safetensors", "--seeds", 2)
    assert code == 0, err
    [path] = Path("results").glob("*_results_*Z.json")
    content = json.loads(path.read_text())
    groups = {}
    for row in content["cells"]:
        groups.setdefault(json.dumps({name: row[name] for name in CELL_FIELDS if name != "seed"}), []).append(row)
    assert len(groups) == len(by_configuration(content["cells"])) == 11
    ((summed_head, *summed), (head, *rows)) = markdown_tables(Path("results", f"{path.stem}_table.md").read_text())
    told_apart(summed_head, summed, "parameters")
    told_apart(head, rows, "parameters")
    assert len(rows) == len(content["cells"]) + 5  # one mean, and nearest and ridge of both inputs
    assert {"inputs", "objective", "skip", "blocks", "seed"} <= set(head)
    assert not {"concepts", "epochs", "layer", "batch_size"} & set(head)
    found = {(row[summed_head.index("seeds")], row[summed_head.index("test cosine")]) for row in summed if
             not row[0].startswith("(")}  # fmt: skip
    assert found == {(str(len(own)), f"{np.mean([row['test_cosine'] for row in own]):.3f}") for own in groups.values()}
    page = Tables(Path("results", f"{path.stem}_report.html").read_text()).rows
    for title in ("Configurations", "Cells"):
        [(head, *rows)] = [found for key, found in page.items() if key[1] == title]
        told_apart(head, rows, "parameters")
    head, rows = terminal_table(content)
    told_apart(head, rows, "parameters")
    [shown] = terminal_tables(out)
    assert [[value for value in row if value] for row in rows] == shown
    assert max(len(line) for line in out.splitlines() if line.startswith(("mlp", "(", "ridge", "transformer"))) <= 100


def test_a_sweep_leaves_ridge_regression_where_that_is_best(workplace, run, small_grid, vectors):
    code, out, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--no-report", "--register", "concepts")
    assert code == 0, err
    [path] = Path("results").glob("*_results_*Z.json")
    content = json.loads(path.read_text())
    best = max((row for row in [*content["cells"], *content["baselines"]]), key=lambda row: row["val_cosine"])
    assert best["student"] == "ridge"  # of a grid of students after three epochs
    student = Student.load(Path("results", f"{path.stem}_student"))
    assert student.config["student"] == "ridge"
    assert student.config["cell"]["concepts"] == best["concepts"]
    assert student.config["metrics"]["val_cosine"] == pytest.approx(best["val_cosine"])
    assert student.config["metrics"]["test_cosine"] == pytest.approx(best["test_cosine"], abs=2e-3)
    assert np.isfinite(student.encode(["a phrase never heard"])).all()
    assert student.nearest(student.encode(["volcano"]), 3)
    assert "in closed form" in student.card
    trained = content["best"]
    line = (
        f"ridge regression on {best['concepts']} concepts, validation cosine {best['val_cosine']:.3f}; the best "
        f"trained student, mlp {trained['name']}, has {trained['val_cosine']:.3f}"
    )
    assert line in out
    client = MlflowClient()
    [parent] = client.search_runs([client.get_experiment_by_name("activation-distillation").experiment_id],
                                  "tags.role = 'sweep'")  # fmt: skip
    assert parent.data.tags["student"] == line
    assert parent.data.tags["best_layer"] == "15"
    assert parent.data.metrics["best_val_cosine"] == pytest.approx(trained["val_cosine"])
    for place in ("models:/concepts@best", f"runs:/{parent.info.run_id}"):
        code, out, err = run("predict", "volcano", "--run", place)
        assert code == 0, err
        np.testing.assert_allclose(json.loads(out)["vector"], student.encode("volcano"), atol=1e-4)


def test_train_leaves_the_student_that_was_asked_for(workplace, run):
    code, out, err = run("train", "--vectors", SHIPPED, "--concepts", 30, "--hidden-dim", 8, "--epochs", 1,
                         "--no-report", "--output", "mine")  # fmt: skip
    assert code == 0, err
    assert Student.load("mine").config["student"] == "mlp"
    assert "mlp c30-h8-l2-e1-s0, validation cosine" in out


def test_a_row_is_its_cell():
    cell = Cell(layer=3, skip=True, patience=4)
    assert cell_of(row_of(cell)) == cell
