"""A report: one page with everything in it, honest intervals, and predictions that are written down and checked."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import SHIPPED

from pipeline.analysis.page import FIGURE_TITLES
from pipeline.analysis.tables import configuration_table, verdict
from pipeline.settings import Cell


class Page(HTMLParser):
    """Titles, pictures and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.titles, self.pictures, self.links, self._in_title = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in_title = tag == "h2"
        found = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            self.pictures.append(found["alt"])

    def handle_data(self, data):
        if self._in_title:
            self.titles.append(data)
            self._in_title = False


def test_larger_cells_are_predicted_before_they_are_trained_and_the_report_says_how_that_fared(workplace, run):
    options = ("--grid", "scaling-laws", "--seeds", 1, "--epochs", 2, "--vectors", SHIPPED, "--sweep-id", "laws")
    code, _, err = run("sweep", *options, "--max-concepts", 400, "--no-report")
    assert code == 0, err
    code, out, err = run("report", "--sweep-id", "laws", "--predict", 400, "--vectors", SHIPPED)
    assert code == 0, err
    [path] = Path("results").glob("scaling-laws_predictions_*.json")
    receipt = json.loads(path.read_text())
    assert receipt["before_training"]
    assert {(cell["concepts"], cell["name"] in out) for cell in receipt["cells"]} == {(700, True), (1838, True)}
    assert all(cell["interval"][0] < cell["cosine"] < cell["interval"][1] for cell in receipt["cells"])
    code, _, err = run("sweep", *options)
    assert code == 0, err
    assert "15 of 21 cells were finished before" in err
    table = max(Path("results").glob("*_table.md")).read_text()
    found = re.search(r"at most 400 concepts .*: 6 larger cells, mean error ([\d.]+), largest ([\d.]+); the 90% "
                      r"intervals cover (\d+)%", table)  # fmt: skip
    assert found, table
    swept = json.loads(max(Path("results").glob("*_results_*.json")).read_text())
    cells = {row["name"]: row["test_cosine"] for row in swept["cells"]}
    errors = [abs(cell["cosine"] - cells[cell["name"]]) for cell in receipt["cells"]]
    assert float(found[1]) == pytest.approx(np.mean(errors), abs=6e-4)
    page = Page(max(Path("results").glob("*_report.html")).read_text())
    assert set(page.pictures) == set(FIGURE_TITLES.values()) - {"Long training", "Students"}
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert {"Configurations", "Best and worst test concepts", "Cells"} <= set(page.titles)


def rows(student, cosines_by_seed):
    return [
        asdict(Cell(student=student, concepts=100, layer=15, seed=seed))
        | {"name": f"c100-{student}-s{seed}", "parameters": 10, "val_cosine": float(np.mean(values)),
           "test_cosine": float(np.mean(values)), "test_cosines": list(values)}
        for seed, values in enumerate(cosines_by_seed)
    ]  # fmt: skip


def results(shift, noise=0.02):
    draw = np.random.default_rng(0)
    hard = draw.normal(0.5, 0.2, 200)  # some concepts are hard for everybody
    student = [hard + shift + draw.normal(0, noise, 200) for _ in range(3)]
    floor = {"concepts": 100, "layer": 15, "inputs": "activations", "targets": "first", "split": "concepts"}
    baselines = [
        floor | {"student": name, "test_cosines": list(own)} | dict.fromkeys(("val_cosine", "test_cosine"), own.mean())
        for name, own in (("mean", 0 * hard), ("nearest", hard - 0.3), ("ridge", hard))
    ]
    cells = rows("mlp", student)
    return {"cells": cells, "baselines": baselines, "best": cells[0]}


def test_results_of_an_older_version_are_said_to_be_so(workplace, run):
    old = results(0.0) | {"grid": "small"}
    for row in old["cells"]:
        del row["test_cosines"]
    Path("old.json").write_text(json.dumps(old))
    code, _, err = run("report", "--results", "old.json", "--vectors", SHIPPED)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: results file old.json: of an older version")


def test_intervals_are_over_concepts_and_seeds():
    head, table = configuration_table(results(0.0))
    [line] = [row for row in table if row[0] == "mlp"]
    low, high = (float(part) for part in line[head.index("95 % interval")].split(" to "))
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / np.sqrt(200), rel=0.2)
    [ridge] = [row for row in table if row[0].startswith("(ridge")]
    assert ridge[head.index("95 % interval")]


def test_a_student_beats_ridge_only_where_the_difference_is_clear():
    assert "It beats ridge" in verdict(results(0.01))  # far less than the concepts differ, but on the same concepts
    assert "It does not beat ridge" in verdict(results(-0.01))
    assert "cannot be told apart from ridge" in verdict(results(0.0))
    assert "cannot be told apart from ridge" in verdict(results(0.0003, noise=1e-4))  # clear, and of no weight
