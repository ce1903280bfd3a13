"""A sweep of many cells: what it asks of MLflow grows with its cells alone, and what it leaves stays usable."""

import json
import sqlite3
import sys
import uuid
from contextlib import closing, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from conftest import SHIPPED, free_port, mlflow_server, move_to
from faults import Faulty

from pipeline import cli

FEW, MANY = 10, 80
OTHERS = 2000  # finished runs of other sweeps in the experiment
MOST_PER_CELL = 45  # requests, most of them files of a cell's student and its code
pytestmark = pytest.mark.timeout(900)  # of the fixture, on a machine with other work


def grid(cells, first_rate):
    rates = ", ".join(f"{first_rate + place / 1e5:.5f}" for place in range(cells // 2))
    return (
        "fixed: {hidden_dim: 8, layers: 1, epochs: 2, concepts: 50}\n"
        f"axes: {{learning_rate: [{rates}], skip: [false, true]}}\n"
    )


def multiply_runs(database, times):
    """Copy one finished cell's run so often, each with a cell key and a sweep of its own."""
    with closing(sqlite3.connect(database)) as connection, connection:
        [[source]] = connection.execute(
            "select runs.run_uuid from runs join tags on tags.run_uuid = runs.run_uuid "
            "where tags.key = 'cell_key' and runs.status = 'FINISHED' limit 1"
        )
        made = [(uuid.uuid4().hex, source) for _ in range(times)]
        for table in ("runs", "tags", "params", "latest_metrics"):
            columns = [row[1] for row in connection.execute(f"pragma table_info({table})") if row[1] != "run_uuid"]
            listed = ", ".join(columns)
            connection.executemany(
                f"insert into {table} (run_uuid, {listed}) select ?, {listed} from {table} where run_uuid = ?", made
            )
        own = [(run, run, key) for run, _ in made for key in ("cell_key", "sweep_id")]
        connection.executemany("update tags set value = ? where run_uuid = ? and key = ?", own)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Requests and bytes of answers of three sweeps, and the folder and output; the server goes on."""
    home, printed, found = tmp_path_factory.mktemp("many"), StringIO(), {}
    with pytest.MonkeyPatch.context() as patch:
        move_to(home, patch)
        with mlflow_server(port := free_port()):
            proxy = Faulty(port)
            patch.setenv("MLFLOW_TRACKING_URI", proxy.url)
            for name, cells, others in (("alone", FEW, 0), ("among others", FEW, OTHERS), ("many", MANY, 0)):
                if others:
                    multiply_runs("server.db", others)
                Path("many.yaml").write_text(grid(cells, 0.001 * (1 + len(found))))
                before = proxy.count, proxy.downloaded
                arguments = ["pipeline", "sweep", "--grid", "many.yaml", "--vectors", str(SHIPPED)]
                patch.setattr(sys, "argv", arguments + ["--no-report"] * (cells == FEW))
                with redirect_stdout(printed), redirect_stderr(printed):
                    cli.main()
                found[name] = proxy.count - before[0], proxy.downloaded - before[1]
            yield found, home, printed.getvalue()
            proxy.close()


def test_requests_grow_with_the_cells_and_not_with_other_runs_of_the_experiment(asked):
    found, _, _ = asked
    (alone, bytes_alone), (others, bytes_others), (many, _) = found.values()
    assert others - alone < 0.1 * alone  # heartbeats, by the clock
    assert bytes_others < 1.2 * bytes_alone + 20_000  # less than five runs more
    assert many / MANY <= min(MOST_PER_CELL, alone / FEW)


def test_the_files_of_many_cells_stay_small(asked):
    _, home, printed = asked
    path = max((home / "results").glob("*_results_*Z.json"), key=lambda found: found.stat().st_mtime)
    content = json.loads(path.read_text())
    assert len(content["cells"]) == MANY
    assert "test_cosines" not in path.read_text()
    with np.load(path.with_name(f"{path.stem}_test_cosines.npz")) as arrays:
        assert arrays["cells"].shape == (MANY, len(arrays["concepts"]))
        for row, own in zip(content["cells"], arrays["cells"], strict=True):
            assert row["test_cosine"] == pytest.approx(own.mean(), abs=1e-4)
        assert arrays["baselines"].shape == (len(content["baselines"]), len(arrays["concepts"]))
    page = path.with_name(f"{path.stem}_report.html")
    rows = page.read_text().count("<tr")
    assert page.stat().st_size < 5e6
    table = page.stat().st_size - sum(file.stat().st_size for file in home.rglob(f"{path.stem}_*.png")) * 4 / 3
    assert page.stat().st_size + table / rows * 2 * (1000 - MANY) < 5e6  # at 1,000 cells: pictures do not grow
    assert page.read_text().count("<details>") == 2
    assert f"{MANY - 50} more stand in {path.relative_to(home)}" in printed
    assert path.stat().st_size < 5000 * MANY


def test_a_report_reads_cosines_beside_the_results_file_and_those_in_an_older_one(asked, run, monkeypatch):
    _, home, _ = asked
    monkeypatch.chdir(home)
    path = max(Path("results").glob("*_results_*Z.json"), key=lambda found: found.stat().st_mtime)
    table = path.with_name(f"{path.stem}_table.md").read_text()
    content, beside = json.loads(path.read_text()), path.with_name(f"{path.stem}_test_cosines.npz")
    with np.load(beside) as arrays:
        for kind in ("cells", "baselines"):
            for row, own in zip(content[kind], arrays[kind].tolist(), strict=True):
                row["test_cosines"] = own
    older = Path("older", path.name)
    older.parent.mkdir()
    older.write_text(json.dumps(content))
    code, _, err = run("report", "--results", older, "--vectors", SHIPPED, "--output", "again")
    assert code == 0, err
    assert Path("again", f"{path.stem}_table.md").read_text() == table
    lone = Path("lone", path.name)
    lone.parent.mkdir()
    lone.write_text(path.read_text())
    code, _, err = run("report", "--results", lone, "--vectors", SHIPPED, "--output", "again")
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"test cosines {lone.with_name(beside.name)}: cannot be read" in line
