"""The examples run as they stand, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED, fresh_database
from forked import Command


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with a student in ``results/``, as `make sweep` leaves one."""
    home = tmp_path_factory.mktemp("examples")
    fresh_database(home / "mlflow.db")
    (home / "grid.yaml").write_text("fixed: {student: ridge, concepts: 100}\naxes: {seed: [0]}\n")
    Command("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED, "--no-report", folder=home).finish()
    return home


def test_steering_shows_what_changes(results):
    command = [sys.executable, ROOT / "examples" / "steer.py", "--concepts", "volcano"]
    done = subprocess.run(command, cwd=results, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [mean] = [line for line in done.stderr.splitlines() if line.startswith("| **mean** |")]
    true, student, chance = (float(value) for value in mean.split("|")[2:5])
    assert min(true, student) > 1 > chance
    assert (results / "results" / "steering.png").stat().st_size > 10_000


def test_the_notebook_runs(results):
    cells = json.loads((ROOT / "examples" / "steer.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    place = results / "examples"
    place.mkdir()
    (place / "steer.py").write_text((ROOT / "examples" / "steer.py").read_text())
    variables = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "volcano" in done.stdout
    assert Path(results / "results" / "steering.png").is_file()
