"""The command line: every wrong input ends with exit code 2, one line, and nothing half-written."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import CATALOGUE, ELSEWHERE, ROOT, SHIPPED
from mlflow import MlflowClient

from pipeline.data.vectors import read_vectors


def refused(result, *parts):
    code, out, err = result
    line = err.strip()
    assert code == 2, err
    assert out == ""
    assert line.startswith("error: ")
    assert "\n" not in line
    for part in parts:
        assert part in line


def damaged(folder, how):
    content = bytearray(SHIPPED.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[len(content) // 3] ^= 1
    elif how == "pickle":
        content = pickle.dumps({"ice": [1.0]})
    path = folder / "vectors.safetensors"
    if how != "missing":
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize(
    ("how", "complaint"),
    [("missing", "not found"), ("truncated", "damaged"), ("flipped", "damaged"), ("pickle", "pickle")],
)
def test_a_wrong_vectors_file(workplace, run, command, how, complaint):
    path = damaged(workplace, how)
    before = sorted(workplace.iterdir())
    refused(run(command, "--vectors", path), "vectors.safetensors", complaint)
    assert sorted(workplace.iterdir()) == before


@pytest.mark.system
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("extract", "--teacher", "qwen9"), ("unknown teacher 'qwen9'", "qwen3-1.7b", "smollm2-135m")),
        (("extract", "--teacher", "smollm2-135m", "--template", "no place"), ("--template 'no place'", "{concept}")),
        (("extract", "--teacher", "smollm2-135m", "--pool", "max"), ("unknown pool 'max'", "last", "mean")),
        (("extract", "--teacher", "smollm2-135m", "--num-concepts", "0"), ("--num-concepts 0", "at least 1")),
        (("extract", "--teacher", "smollm2-135m", "--output", "s3://bucket/key"), ("s3://bucket/key",)),
        (("train", "--student", "cnn"), ("unknown student 'cnn'", "mlp", "ridge")),
        (("train", "--objective", "l1"), ("unknown objective 'l1'", "cosine", "mse")),
        (("train", "--layer", "3"), ("--layer 3", "1, 2, 4, 6, 15, 22")),
        (("train", "--concepts", "99999"), ("--concepts 99999", "training concepts")),
        (("train", "--epochs", "0"), ("--epochs 0", "at least 1")),
        (("train", "--epochs", "-5"), ("--epochs -5", "at least 1")),
        (("train", "--epochs", "many"), ("--epochs", "many")),
        (("train", "--learning-rate", "nan"), ("--learning-rate nan",)),
        (("train", "--output", "/proc/none/here"), ("/proc/none/here",)),
        (("sweep", "--grid", "scalling"), ("unknown grid 'scalling'", "scaling")),
        (("sweep", "--epochs", "0"), ("--epochs 0", "at least 1")),
        (("sweep", "--seeds", "0"), ("--seeds 0", "at least 1")),
        (("sweep", "--sweep-id", "a' b"), ("--sweep-id",)),
        (("sweep", "--gird", "scaling"), ("No such option", "--gird")),
        (("report", "--results", "none.json"), ("none.json",)),
        (("report",), ("no results file in results",)),
        (("sweeep",), ("sweeep",)),
    ],
)
def test_a_wrong_option_is_named_with_what_exists(workplace, run, arguments, parts):
    if arguments[0] in ("train", "sweep", "report"):
        arguments += ("--vectors", str(SHIPPED))
    elif arguments[0] == "extract":
        arguments += ("--concepts", str(ROOT / "data" / "concepts.csv"))
    refused(run(*arguments), *parts)
    assert not list(workplace.rglob("*.safetensors"))
    assert not list(workplace.rglob("*.part"))


def test_an_unknown_layer_of_the_teacher(workplace, run, tiny_folder):
    concepts = ROOT / "data" / "concepts.csv"
    result = run("extract", "--teacher", tiny_folder("gpt2"), "--layers", "5", "--concepts", concepts)
    refused((result[0], result[1], last_line(result[2])), "--layers 5", "blocks 0 (embeddings) to 4")


def last_line(text):
    return text.strip().splitlines()[-1]


def test_a_wrong_concepts_file(workplace, run):
    path = workplace / "mine.csv"
    path.write_text("concept,category\nice,Food\nice,Food\n")
    refused(run("extract", "--teacher", "smollm2-135m", "--concepts", path), "mine.csv, line 3", "'ice'")
    path.write_bytes(b"concept,category\ncaf\xe9,Food\n")
    refused(run("extract", "--teacher", "smollm2-135m", "--concepts", path), "mine.csv", "not UTF-8")


@pytest.fixture
def silent_server():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_tracking_server_that_does_not_answer(workplace, run, monkeypatch, silent_server):
    for uri in ("http://name:secret@127.0.0.1:9", silent_server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        result = run("train", "--vectors", SHIPPED, "--epochs", "1")
        refused(result, "MLFLOW_TRACKING_URI", "no MLflow server")
        assert "secret" not in result[2]
        assert not list(workplace.rglob("*.json"))


def test_extract_writes_tracks_and_repeats_itself(workplace, run, tiny_folder):
    concepts = ROOT / "data" / "concepts.csv"
    common = ("extract", "--teacher", tiny_folder("qwen3"), "--concepts", concepts, "--num-concepts", "80")
    code, out, err = run(*common, "--layers", "1,3", "--output", "a.safetensors")
    assert code == 0, err
    assert "80 concepts" in out
    assert run(*common, "--layers", "1,3", "--output", "b.safetensors")[0] == 0
    first = read_vectors(Path("a.safetensors"))
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert first.vectors.shape == (80, 1, 2, 32)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("activation-distillation")
    runs = client.search_runs([experiment.experiment_id])
    assert {found.info.status for found in runs} == {"FINISHED"}
    assert {item.path for item in client.list_artifacts(runs[0].info.run_id)} == {
        "b.safetensors", "manifest.json", "norms.png", "structure.png",
    }  # fmt: skip
    assert {"concepts_per_second", "tokens_per_second", "flops_per_second", "peak_memory_mb"} <= set(
        runs[0].data.metrics
    )
    assert runs[0].data.params["layers"] == "1,3"
    assert runs[0].inputs.dataset_inputs
    manifest = json.loads(Path(client.download_artifacts(runs[0].info.run_id, "manifest.json")).read_text())
    assert manifest["sha256"] == first.sha256
    assert manifest["extraction_key"] == runs[0].data.tags["extraction_key"] == first.extraction_key
    assert set(manifest["norms"]) == {"1", "3"}
    written = Path("a.safetensors").stat().st_mtime_ns
    code, out, _ = run(*common, "--layers", "1,3", "--output", "a.safetensors")
    assert (code, Path("a.safetensors").stat().st_mtime_ns) == (0, written)
    assert "nothing to do" in out
    code, _, err = run("train", "--vectors", f"runs:/{runs[0].info.run_id}/b.safetensors", "--concepts", 40,
                       "--epochs", 1, "--batch-size", 16, "--layer", 3, "--no-report")  # fmt: skip
    assert code == 0, err
    for command in ("report", "evaluate"):  # which know where the vectors were
        code, _, err = run(command)
        assert code == 0, err


def test_nothing_is_written_over_unasked(workplace, run, tiny_folder, caplog):
    Path("mine.csv").write_text("concept,category\n" + "".join(f"thing{n},things\n" for n in range(3)))
    Path("junk.safetensors").write_bytes(b"precious")
    common = ("extract", "--teacher", tiny_folder("gpt2"), "--concepts", "mine.csv")
    refused(run(*common, "--output", "mine.csv"), "--output mine.csv", "the file of the concepts")
    refused(run(*common, "--output", "junk.safetensors"), "--output junk.safetensors", "no vectors file")
    assert Path("junk.safetensors").read_bytes() == b"precious"
    assert run(*common, "--output", "out.safetensors")[0] == 0
    assert "students need some of each side" in caplog.text
    before = Path("out.safetensors").read_bytes()
    other = (*common, "--output", "out.safetensors", "--layers", 1)
    refused(run(*other), "--output out.safetensors: holds other vectors (layers 2, asked for 1)", "--overwrite")
    assert Path("out.safetensors").read_bytes() == before
    assert run(*other, "--overwrite")[0] == 0
    assert "replaces other vectors" in caplog.text
    assert read_vectors(Path("out.safetensors")).layers == (1,)
    assert run(*common, "--output", "out.pt")[0] == 0
    refused(run(*common, "--output", "out.pt", "--layers", 1), "--output out.pt: holds other vectors", "--overwrite")
    assert run(*common, "--output", "out.pt", "--layers", 1, "--overwrite")[0] == 0


@pytest.mark.system
def test_vectors_that_come_with_the_project_are_not_written_over(workplace, run):
    before = SHIPPED.stat().st_mtime_ns
    common = ("extract", "--teacher", "smollm2-135m", "--concepts", CATALOGUE, "--num-concepts", 20)
    for more in ((), ("--overwrite",)):
        refused(run(*common, "--output", SHIPPED, *more), "comes with the project", "concepts 2,238, asked for 20")
    assert SHIPPED.stat().st_mtime_ns == before


def test_shards_leave_parts_and_the_last_one_merges(workplace, run, tiny_folder):
    concepts = ROOT / "data" / "concepts.csv"
    common = ("extract", "--teacher", tiny_folder("gpt2"), "--concepts", concepts, "--num-concepts", "61")
    common += ("--layers", "1,3", "--output", "out.safetensors")
    for shard in ("2/3", "0/3"):
        code, out, err = run(*common, "--shard", shard)
        assert code == 0, err
        assert f"shard {shard} is done" in out
        assert not Path("out.safetensors").exists()
    code, out, err = run(*common, "--shard", "1/3", "--merge")
    assert (code, last_line(err)[:6]) == (1, "error:")
    assert "1 of 3 parts" in err
    code, out, err = run(*common, "--shard", "1/3")
    assert code == 0, err
    assert "61 concepts" in out
    left = {path.name for path in workplace.glob("out*")}
    assert left == {"out.safetensors", "out.vocabulary.safetensors"}
    refused(run(*common, "--shard", "3/3"), "--shard 3/3", "0 to n - 1")


@pytest.mark.system
def test_two_processes_divide_the_concepts(workplace, run, tiny_folder):
    concepts = ROOT / "data" / "concepts.csv"
    common = ["extract", "--teacher", str(tiny_folder("gpt2")), "--concepts", str(concepts), "--num-concepts", "61"]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "pipeline",
        *common, "--output", "two.safetensors",
    ]  # fmt: skip
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run(*common, "--output", "one.safetensors")[0] == 0
    one, two = read_vectors(Path("one.safetensors")), read_vectors(Path("two.safetensors"))
    assert one.concepts == two.concepts
    np.testing.assert_allclose(one.vectors, two.vectors, atol=4e-3)
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("activation-distillation").experiment_id])
    assert [entry.info.status for entry in found] == ["FINISHED"] * 2


def test_a_vector_in_the_attention_sink_is_warned_of(workplace, run, tiny_folder, caplog):
    (workplace / "mine.csv").write_text("concept,category\n" + "".join(f"{chr(97 + i)},Made\n" for i in range(20)))
    code, _, err = run("extract", "--teacher", tiny_folder("gpt2"), "--concepts", "mine.csv", "--layers", "2",
                       "--template", "{concept}", "--output", "out.safetensors")  # fmt: skip
    assert code == 0, err
    assert "20 concepts are read at position 0, the attention sink (a, b, c, d, e, ...)" in caplog.text


@pytest.mark.system
@pytest.mark.parametrize("option", [("--dtype", "int8"), ("--device-map", "auto")])
def test_big_teachers_load_in_other_ways(workplace, run, tiny_folder, option):
    concepts = ROOT / "data" / "concepts.csv"
    common = ("extract", "--teacher", tiny_folder("qwen3"), "--concepts", concepts, "--num-concepts", "40")
    assert run(*common, "--output", "plain.safetensors")[0] == 0
    code, _, err = run(*common, "--output", "other.safetensors", *option)
    assert code == 0, err
    plain, other = (read_vectors(Path(f"{name}.safetensors")).vectors for name in ("plain", "other"))
    assert np.linalg.norm(other - plain) < 0.05 * np.linalg.norm(plain)


def test_the_default_output_is_named_after_the_teacher(workplace, run, tiny_folder):
    (workplace / "mine.csv").write_text("concept,category\n" + "".join(f"w{chr(97 + i)}x,Made\n" for i in range(20)))
    code, _, err = run("extract", "--model", tiny_folder("gpt2"), "--concepts", "mine.csv", "--layers", "all",
                       "--template", "{concept}", "--template", "About {concept}:", "--pool", "mean")  # fmt: skip
    assert code == 0, err
    path, vocabulary = sorted(Path("data/vectors").iterdir())
    assert vocabulary.name == f"{path.stem}.vocabulary.safetensors"
    found = read_vectors(path)
    assert path.stem == found.teacher == tiny_folder("gpt2").name
    assert found.vectors.shape == (20, 2, 5, 32)
    assert np.isfinite(found.vectors).all()


@pytest.mark.system
def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(workplace, run, small_grid, monkeypatch):
    monkeypatch.setattr("pipeline.commands.display.NOTICE_SECONDS", 0.3)
    code, out, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--epochs", 300, "--no-report")
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("train: ")]
    assert len(lines) > 2
    best = r"(, val cosine 0\.\d+ \(c\d+-h\d+-l2-e300-b16-s0\))?"
    shape = rf"train: \d/4 cells{best}, 0:00:\d\d so far(, about \d:\d\d:\d\d left)?"
    assert all(re.fullmatch(shape, line) for line in lines), lines
    assert lines[-1].startswith("train: 4/4 cells, val cosine")
    assert "make ui" in out  # the database is here
    assert "\r" not in err
    code, _, err = run("evaluate", "--vectors", SHIPPED)
    assert code == 0, err
    assert "evaluate: 4/4, " in err.splitlines()[-1]


# Each line is a command; the libraries are loaded once.
COMMANDS = """
import shlex, sys
from pipeline.cli import main

for line in sys.stdin:
    sys.argv = ["pipeline", *shlex.split(line)]
    main()
"""


@pytest.mark.system
def test_no_command_needs_a_call_that_only_linux_has(workplace, tiny_folder, small_grid):
    vectors, teacher = "--vectors v.safetensors", f"--teacher {tiny_folder('gpt2')}"
    lines = [
        f"extract {teacher} --concepts {CATALOGUE} --num-concepts 150 --output v.safetensors",
        f"sweep --grid {small_grid} {vectors} --no-report",
        f"train --student ridge --concepts 40 {vectors} --no-report --output student",
        f"report {vectors}",
        f"evaluate {vectors} {teacher}",
        "predict --run student volcano --nearest 2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], env={**os.environ, "PYTHONPATH": ELSEWHERE}, input="\n".join(lines),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    [path] = Path("results").glob("small_results_*Z.json")
    assert len(json.loads(path.read_text())["cells"]) == 4
    assert list(Path("results").glob("*_evaluation_*.md"))
    assert list(Path("results").glob("*.png"))
    assert "volcano" in done.stdout


def test_a_dry_run_shows_the_cells_and_trains_nothing(workplace, run, small_grid):
    before = sorted(workplace.iterdir())
    code, out, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--dry-run")
    assert code == 0, err
    assert "small: 4 cells, about" in out
    for name in ("c20-h8-l2-e3-b16-s0", "c40-h16-l2-e3-b16-s0"):
        assert name in out
    assert sorted(workplace.iterdir()) == before


@pytest.mark.parametrize(("words", "expected"), [("--help", "[default: scaling]"), ("--grid nope", "grid 'nope'")])
def test_help_and_a_wrong_grid_are_answered_without_loading_anything_heavy(words, expected):
    code = f"import sys; sys.argv = 'x sweep {words}'.split()\n" \
           "from pipeline.cli import main\n" \
           "try: main()\n" \
           "except SystemExit: pass\n" \
           "assert not {'torch', 'mlflow', 'transformers', 'accelerate'} & set(sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout + done.stderr


@pytest.mark.system
def test_tracking_goes_to_sqlite_where_the_environment_names_nothing(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.set_tracking_uri(None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    code, _, err = run("train", "--vectors", SHIPPED, "--student", "ridge", "--concepts", 30)
    assert code == 0, err
    assert Path("mlflow.db").is_file()
    assert Path("mlruns").is_dir()
