"""What users, scripts and earlier files rely on stays as it is: help texts, entry points, and the files that are left.

Each is kept in ``tests/frozen``. Where a change is meant, FREEZE=1 pytest -n0 tests/test_frozen.py writes them again,
and the difference is reviewed like any other.
"""

import json
import os
import re

import pytest
import yaml
from click.testing import CliRunner
from conftest import CATALOGUE, ROOT, SHIPPED
from safetensors import safe_open

from pipeline.cli import cli

FROZEN = ROOT / "tests" / "frozen"
TIME = re.compile(r"\d{8}T\d{6}Z")


def is_frozen(name, text):
    path = FROZEN / name
    if os.environ.get("FREEZE"):
        path.write_text(text)
    assert text == path.read_text()


def as_json(content):
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_help(name):
    words = [*([name] if name else []), "--help"]
    shown = CliRunner(env={"COLUMNS": "120"}).invoke(cli, words, prog_name="python -m pipeline", catch_exceptions=False)
    is_frozen(f"help-{name or 'all'}.txt", shown.output)


def test_entry_points():
    entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    is_frozen("entry-points.json", as_json(entries))


def shape(value):
    """The keys and types of JSON, rows of one kind merged."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        shapes = [shape(item) for item in value]
        if shapes and all(isinstance(item, dict) for item in shapes):
            return [{key: item[key] for item in shapes for key in item}]
        return [sorted({json.dumps(item) for item in shapes})]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def files_of(folder):
    """The files below a folder, without what is tracked, and the structure of those that programs read."""
    left = {}
    for path in sorted(folder.rglob("*")):
        name = TIME.sub("<time>", str(path.relative_to(folder)))
        if path.is_dir() or name.startswith(("mlruns/", "mlflow.db", "model/")) or name.endswith(".yaml"):
            continue
        left[name] = None
        if path.suffix == ".json" and path.name != "tokenizer.json":
            left[name] = shape(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            with safe_open(path, "numpy") as file:
                tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
                left[name] = {
                    "tensors": {key: [value.get_dtype(), len(value.get_shape())] for key, value in tensors.items()},
                    "header": sorted(file.metadata() or {}),
                }
    return left


def test_files_of_a_sweep(workplace, run, small_grid):
    code, _, err = run("sweep", "--grid", small_grid, "--vectors", SHIPPED)
    assert code == 0, err
    is_frozen("sweep.json", as_json(files_of(workplace)))


def test_files_of_an_extraction(workplace, run, tiny_folder):
    concepts = workplace / "concepts.csv"
    concepts.write_text("".join(CATALOGUE.read_text().splitlines(keepends=True)[:41]))
    code, _, err = run(
        "extract", "--teacher", tiny_folder("qwen3"), "--concepts", concepts, "--output", workplace / "v.safetensors"
    )
    assert code == 0, err
    is_frozen("extraction.json", as_json(files_of(workplace)))
