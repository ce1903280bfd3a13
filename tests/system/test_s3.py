"""Commands of several machines that have a real S3 server in common."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHIPPED
from processes import PATIENCE

from pipeline import storage
from pipeline.s3 import object_names
from pipeline.student.student import Student

CSV = "concept,category\n" + "".join(f"{name},any\n" for name in ("ice", "fire", "slow cooking", "rain", "sun", "moon"))


@pytest.fixture
def options(workplace, tiny_folder):
    """The options of a small extraction; its output comes after them."""
    Path("c.csv").write_text(CSV)
    return ("extract", "--teacher", str(tiny_folder("gpt2")), "--layers", "1,2", "--concepts", "c.csv", "--output")


@pytest.fixture
def extract(options, run):
    """Extract in this process: ``out = extract(output, "--shard", "1/2")``."""

    def call(output, *arguments):
        code, out, err = run(*options, output, *arguments)
        assert code == 0, err
        return out

    return call


def start(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_shards_on_several_machines_meet_in_s3(s3, options, extract, tmp_path, monkeypatch):
    place = "s3://bucket/v.safetensors"
    extract("whole.safetensors")
    s3.every = 5
    assert "1 parts are left" in extract(place, "--shard", "1/2")
    assert "v.safetensors" not in object_names("s3://bucket")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # another machine, which has only S3 in common
    done = start([sys.executable, "-m", "pipeline", *options, place, "--shard", "0/2"])
    assert done.returncode == 0, done.stderr
    assert "sha256" in done.stdout
    assert not list(tmp_path.glob("activation-distillation-*/*"))
    assert object_names("s3://bucket") == {"v.safetensors", "v.vocabulary.safetensors"}
    assert storage.fetch(place).read_bytes() == Path("whole.safetensors").read_bytes()
    assert "nothing to do" in extract(place)


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime")
def test_a_clock_that_is_an_hour_off_is_said_and_nothing_is_left(s3, options, extract):
    s3.punctual = True
    place = "s3://bucket/v.safetensors"
    done = start(["faketime", "-f", "+1h", sys.executable, "-m", "pipeline", *options, place])
    assert done.returncode == 1, done.stderr
    assert "clock of this machine is off" in done.stderr.splitlines()[-1]
    assert object_names("s3://bucket") == set()
    assert "sha256" in extract(place)
    assert {"v.safetensors"} <= object_names("s3://bucket")


def test_a_sweep_reads_and_writes_s3(s3, workplace, run, small_grid):
    storage.upload(SHIPPED, "s3://bucket/v.safetensors")
    storage.upload(small_grid, "s3://bucket/grids/small.yaml")
    code, _, err = run("sweep", "--grid", "s3://bucket/grids/small.yaml", "--vectors", "s3://bucket/v.safetensors",
                         "--output", "s3://bucket/results")  # fmt: skip
    assert code == 0, err
    names = object_names("s3://bucket/results")
    assert {Path(name).suffix for name in names} == {".json", ".html", ".md", ".npz", ".png", ".safetensors"}
    [folder] = {name.split("/")[0] for name in names if name.endswith("model.safetensors")}
    student = Student.load(f"s3://bucket/results/{folder}")
    assert student.encode(["volcano"]).shape == (1, 576)
    [results] = [name for name in names if name.endswith(".json") and "/" not in name]
    assert run("report", "--results", f"s3://bucket/results/{results}", "--vectors", SHIPPED)[0] == 0
