"""The house rules: libraries have their rooms, options live once, the doors name what exists."""

import ast
import re
import subprocess
import sys
from dataclasses import MISSING, fields

import click
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

from pipeline.cli import cli
from pipeline.settings import (
    Cell,
    EvaluateOptions,
    ExtractOptions,
    PredictOptions,
    PushOptions,
    ReportOptions,
    SweepOptions,
    TrainOptions,
)
from pipeline.tracking.runs import STUDENT_CODE

JOBS = {
    "extract": ExtractOptions,
    "train": TrainOptions,
    "sweep": SweepOptions,
    "report": ReportOptions,
    "evaluate": EvaluateOptions,
    "predict": PredictOptions,
}
COMMANDS = JOBS | {"push": PushOptions}
LAUNCHER = {"processes"}
SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("mlflow", {"tracking", "student"}),  # a served student answers in MLflow's own errors
        ("boto3", {"s3"}),
        ("click", {"cli"}),
        ("huggingface_hub", {"hub", "commands"}),
    ],
)
def test_a_library_has_its_rooms(library, rooms):
    users = {room_of(path) for path in SOURCES if any(name.split(".")[0] == library for name in imports(path))}
    assert users <= rooms


def default_in_mlproject(item):
    """An option's default as an MLproject parameter, which cannot be absent, a flag, or a list."""
    if item.default is MISSING or item.default is None:
        return ""
    if isinstance(item.default, bool):
        name = item.name.replace("_", "-")
        return name if item.default else f"no-{name}"
    return next(iter(item.default), "") if isinstance(item.default, tuple) else item.default


@pytest.mark.parametrize("name", JOBS)
def test_the_mlproject_offers_the_options_of_the_command_with_their_defaults(name):
    entry = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"][name]
    offered = {key: value["default"] for key, value in entry["parameters"].items()}
    expected = {item.name: default_in_mlproject(item) for item in fields(JOBS[name])}
    assert {key: value for key, value in offered.items() if key not in LAUNCHER} == expected
    used = set(re.findall(r"{(\w+)}", entry["command"]))
    assert used == set(offered)
    for key in expected:
        flag = "--" + key.replace("_", "-")
        assert f"{flag} {{{key}}}" in entry["command"] or f"--{{{key}}}" in entry["command"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    command = cli.commands[name]
    assert command.help
    helps = {parameter.name: parameter.help for parameter in command.params if isinstance(parameter, click.Option)}
    assert set(helps) == {item.name for item in fields(COMMANDS[name])} | {"verbose"}
    assert all(helps.values())


def test_every_cell_option_can_be_an_option_of_train():
    assert {item.name for item in fields(Cell)} < {item.name for item in fields(TrainOptions)}


def test_the_readme_names_targets_and_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", readme)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_shipped_data_stay_small():
    shipped = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sum((ROOT / name).stat().st_size for name in shipped.stdout.split()) < 40e6


def test_a_logged_student_carries_all_the_code_that_it_imports():
    def at_once(path):  # not those inside functions: torch and the hub are for where the whole program is
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
                yield from [node.module.split(".")[1]] if "." in node.module else [name.name for name in node.names]

    carried = {name.removesuffix(".py") for name in STUDENT_CODE}
    for path in SOURCES:
        if room_of(path) in carried:
            assert set(at_once(path)) <= carried, path


NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
NEEDED = {"gguf", "pandas"}  # by transformers and MLflow, in ways that they leave to their users


def test_every_package_that_is_imported_is_declared_with_bounds_that_hold_the_pin():
    stated = [Requirement(line.split("#")[0]) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version.strip() for name, version in pins.items()}
    used = {name.split(".")[0] for path in SOURCES for name in imports(path)} - {"pipeline", *sys.stdlib_module_names}
    names = {one.name.lower().replace("_", "-") for one in stated}
    assert names == {NAMES.get(name, name).replace("_", "-") for name in used} | NEEDED
    for one in stated:
        assert {bound.operator for bound in one.specifier} == {">=", "<"}, one
        assert one.specifier.contains(pins[one.name.lower().replace("_", "-")]), one
    assert not any("+" in version for version in pins.values())  # of a build that indexes do not offer
