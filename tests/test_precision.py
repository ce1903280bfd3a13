"""Precision is the one requested, or follows from the weights and the kind of device."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CATALOGUE, SHIPPED
from mlflow import MlflowClient

from pipeline.data.concepts import read_catalogue
from pipeline.data.vectors import read_vectors
from pipeline.devices import teacher_precision, training_precision
from pipeline.extraction.parts import PartPlan
from pipeline.extraction.request import make_request
from pipeline.settings import Cell
from pipeline.storage import Output
from pipeline.sweep.cells import cell_key
from pipeline.teachers.find import find_teacher
from pipeline.teachers.load import load_teacher
from pipeline.training.stack import precision_of_cell

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("stored", "device", "expected"),
    [
        (torch.bfloat16, CUDA, "bfloat16"),
        (torch.float16, CUDA, "bfloat16"),
        (torch.float8_e4m3fn, CUDA, "bfloat16"),
        (torch.float32, CUDA, "float32"),
        (None, CUDA, "float32"),
        (torch.bfloat16, CPU, "float32"),
        (torch.float32, CPU, "float32"),
    ],
)
def test_a_teachers_precision_follows_from_weights_and_kind_of_device(stored, device, expected):
    assert teacher_precision(stored, device) == expected


def test_a_cells_precision_and_key_follow_from_the_kind_of_device():
    assert (training_precision(CPU), training_precision(CUDA)) == ("float32", "bfloat16")
    for cell in (Cell(), Cell(student="transformer")):
        assert precision_of_cell(cell, "bfloat16") == "bfloat16"
        assert precision_of_cell(replace(cell, precision="float32"), "bfloat16") == "float32"
        assert cell_key(cell, "data", "bfloat16") != cell_key(cell, "data", "float32")
    for kind in ("ridge", "kernel", "truncated"):  # which are float64 everywhere
        assert cell_key(Cell(student=kind), "data", "bfloat16") == cell_key(Cell(student=kind), "data", "float32")


def test_weights_of_16_bits_are_found_alike_on_every_processor(tiny_folder, tmp_path):
    source = find_teacher(str(tiny_folder("llama")), device="cuda")
    assert source.dtype == "float32"
    model = load_teacher(find_teacher(str(tiny_folder("llama"))))
    model.model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert find_teacher(str(tmp_path)).dtype == "float32"
    assert find_teacher(str(tmp_path), device="cuda").dtype == "bfloat16"


@pytest.mark.system
def test_a_sweep_on_another_processor_has_the_same_keys_and_curves(workplace, small_grid):
    found = []
    for capability in ("", "default"):  # this processor's own instructions, and those of any
        command = [sys.executable, "-m", "pipeline", "sweep", "--grid", small_grid, "--vectors", SHIPPED, "--no-report",
                   "--no-resume", "--output", f"out{capability}"]  # fmt: skip
        other = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "SSE41"} if capability else {}
        done = subprocess.run(command, env={**os.environ, **other}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        [path] = Path(f"out{capability}").glob("*_results_*.json")
        found.append({row["cell_key"]: row for row in json.loads(path.read_text())["cells"]})
    here, there = found
    assert here.keys() == there.keys()
    for key, row in here.items():
        assert row["dtype"] == there[key]["dtype"] == "float32"
        assert row["curves"]["epoch"] == there[key]["curves"]["epoch"]
        for curve in ("train_loss", "val_cosine"):
            np.testing.assert_allclose(row["curves"][curve], there[key]["curves"][curve], atol=1e-4)


@pytest.mark.system
def test_workers_of_a_sweep_keep_to_the_precision_that_the_first_one_recorded(workplace, run, small_grid, caplog):
    caplog.set_level("INFO")
    arguments = ("sweep", "--grid", small_grid, "--vectors", SHIPPED, "--no-report", "--sweep-id", "mixed")
    code, _, err = run(*arguments, "--shard", "0/2")
    assert code == 0, err
    client = MlflowClient()
    experiment = client.get_experiment_by_name("activation-distillation").experiment_id
    [parent] = client.search_runs([experiment], "tags.role = 'sweep'")
    assert parent.data.tags["precision"] == "float32"
    client.set_tag(parent.info.run_id, "precision", "bfloat16")  # as where the first worker was on CUDA
    for shard in ("1/2", "0/2"):
        code, _, err = run(*arguments, "--shard", shard)
        assert code == 0, err
        assert "precision bfloat16, as its first worker recorded it" in caplog.text
        caplog.clear()
    [path] = Path("results").glob("*_results_*.json")
    assert {row["dtype"] for row in json.loads(path.read_text())["cells"]} == {"bfloat16"}


def test_shards_of_an_extraction_keep_to_the_precision_that_the_first_one_recorded(workplace, run, tiny_folder, caplog):
    caplog.set_level("INFO")
    folder = str(tiny_folder("gpt2"))
    arguments = ("extract", "--teacher", folder, "--concepts", CATALOGUE, "--num-concepts", 40, "--layers", 2,
                 "--no-vocabulary", "--token-block", 1, "--output", "out.safetensors")  # fmt: skip
    asked = {"layers": "2", "templates": ["Tell me about {concept}"], "count": 40, "token_block": 1}
    request = make_request(find_teacher(folder, "bfloat16"), read_catalogue(str(CATALOGUE)), **asked)
    PartPlan.open(Output(Path("out.safetensors")), request, 32, 2, 64, dtype_is_open=True)  # a worker on CUDA
    for shard in ("0/2", "1/2"):
        code, out, err = run(*arguments, "--shard", shard)
        assert code == 0, err
        assert "precision bfloat16, as the first worker recorded it" in caplog.text
        caplog.clear()
    found = read_vectors(workplace / "out.safetensors")
    assert (found.dtype, found.extraction_key) == ("bfloat16", request.key)
    code, out, err = run(*arguments, "--shard", "1/2")  # once more, after the others have merged
    assert "holds these very vectors already" in out, err
