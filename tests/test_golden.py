"""Results do not move unseen: golden numbers, and the versions by which finished work is taken over."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import golden
import numpy as np
import pytest
from conftest import ROOT, SHIPPED

from pipeline.extraction.reader import read_texts
from pipeline.extraction.request import make_request
from pipeline.settings import RESULTS_VERSION, Cell
from pipeline.sweep.grid import read_grid

WRITTEN = json.loads(golden.FILE.read_text())


def test_results_are_those_of_their_version():
    assert WRITTEN["version"] == RESULTS_VERSION, (
        f"RESULTS_VERSION is {RESULTS_VERSION}; write the golden numbers again with: {golden.COMMAND}"
    )
    lines = golden.moved(WRITTEN, golden.compute())
    assert not lines, (
        "results moved: raise RESULTS_VERSION in pipeline/settings.py, and write the golden numbers again with "
        f"{golden.COMMAND}\n" + "\n".join(lines)
    )


def test_every_option_of_a_cell_is_among_the_golden_numbers():
    changed = {name for options in (*golden.OPTIONS, *golden.OF_TEMPLATES) for name in options}
    assert changed == set(Cell.__dataclass_fields__) - {"concepts"}  # of which the scaling grid has several
    assert len(WRITTEN["cells"]) == 24 + len(golden.OPTIONS) + len(golden.OF_TEMPLATES)


def test_a_change_in_what_is_computed_is_noticed(monkeypatch):
    monkeypatch.setattr(golden, "OPTIONS", golden.OPTIONS[:1])
    monkeypatch.setattr(golden, "OF_TEMPLATES", golden.OF_TEMPLATES[:1])
    monkeypatch.setattr(golden, "read_grid", lambda name, epochs: replace(read_grid(name, epochs), cells=[]))
    monkeypatch.setattr("pipeline.training.stack.WARM_UP", 0.2)
    now = golden.compute()
    known = {"cells": {cell: WRITTEN["cells"][cell] for cell in now["cells"]}, "vectors": WRITTEN["vectors"]}
    assert {line.split(":")[0] for line in golden.moved(known, now)} >= set(now["cells"])


def test_the_extraction_is_that_of_the_shipped_vectors(vectors, catalogue, smollm2):
    """`EXTRACTION_VERSION` is raised when these differ, and the shipped vectors are made again."""
    source, teacher = smollm2
    layers = ",".join(map(str, vectors.layers))
    request = make_request(source, catalogue, layers=layers, templates=vectors.templates, token_block=1)
    assert request.key == vectors.extraction_key
    rows = range(0, len(vectors.concepts), 400)
    for place, layer in enumerate(vectors.layers):
        concepts = [vectors.concepts[row] for row in rows]
        found = read_texts(teacher, concepts, vectors.templates[0], layer, vectors.pool)
        shipped = vectors.vectors[list(rows), 0, place].astype(np.float32)
        # The file has 11 bits; sums in another order add less than that.
        error = np.linalg.norm(found - shipped, axis=1) / np.linalg.norm(shipped, axis=1)
        assert error.max() < 2e-3, f"layer {layer}: extraction moved; raise EXTRACTION_VERSION (data/vectors.py)"


@pytest.mark.system
def test_an_edited_comment_reuses_finished_cells_and_a_raised_version_does_not(workplace, small_grid):
    shutil.copytree(ROOT / "pipeline", workplace / "edited" / "pipeline")
    command = [sys.executable, "-m", "pipeline", "sweep", "--grid", small_grid, "--vectors", SHIPPED, "--no-report"]

    def finished_before():
        path = os.pathsep.join([str(workplace / "edited"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, cwd=workplace, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return "4 of 4 cells were finished before" in done.stderr

    def edit(name, before, after):
        path = workplace / "edited" / "pipeline" / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))

    assert not finished_before()
    for name in ("training/stack.py", "training/trainer.py", "data/dataset.py", "metrics.py", "training/mlp.py"):
        edit(name, "from __future__", "# An edited comment.\nfrom __future__")
    assert finished_before()
    edit("settings.py", f"RESULTS_VERSION = {RESULTS_VERSION}", f"RESULTS_VERSION = {RESULTS_VERSION + 1}")
    assert not finished_before()
