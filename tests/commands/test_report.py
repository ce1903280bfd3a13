"""A report: one page with everything in it, and predictions that are written down and checked."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import SHIPPED

from pipeline.commands.page import FIGURE_TITLES
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


@pytest.mark.system
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


def test_results_of_an_older_version_are_said_to_be_so(workplace, run):
    row = asdict(Cell(concepts=100, layer=15)) | {"name": "c100"}
    Path("old.json").write_text(json.dumps({"grid": "small", "cells": [row], "baselines": [], "best": row}))
    code, _, err = run("report", "--results", "old.json", "--vectors", SHIPPED)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: results file old.json: of an older version")
