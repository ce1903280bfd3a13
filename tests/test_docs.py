"""The pages: each command parses where it runs, the quick ones run, snippets run, and links and files exist."""

import itertools
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import click
import pytest
import torch
import yaml
from conftest import ROOT, SHIPPED
from mlflow.cli import cli as mlflow_cli
from vocabularies import find_vocabulary

from pipeline.cli import cli
from pipeline.settings import Cell
from pipeline.sweep.grid import read_grid
from pipeline.training.export import checkpoint, export
from pipeline.training.trainer import train_stack

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
MADE = {"data/vectors/words.safetensors"}  # by commands
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^(results/|mlflow\.db)", re.MULTILINE)  # a block that shows files, not commands


def blocks(page, language=""):
    """The code blocks of a page in one language; commands have none."""
    found = [text for name, text in CODE.findall(page.read_text()) if name == language]
    return [text for text in found if not OUTPUT.match(text)]


def fenced(page):
    """The lines of a page's blocks without their comments."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield " ".join(map(shlex.quote, words)) if not {"|", ">", "&&"} & set(words) else line


def in_text(page):
    """Commands between single backquotes: those of tables and sentences."""
    text = CODE.sub("", page.read_text())
    starts = "python -m pipeline [a-z]|kubectl [a-z]|mlflow [a-z]|make [a-z]|accelerate launch|pip install|conda env"
    return [command for command in re.findall(r"`([^`]+)`", text.replace("\n", " ")) if re.match(starts, command)]


COMMANDS = sorted({command for page in PAGES for find in (fenced, in_text) for command in find(page)})


def parts(command):
    """The words of each command of a pipeline, without redirections and what stands for more."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|>;&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = [word for word in lexer if word not in ("…", "...", "..")]
    found = [[]]
    for word in words:
        if word in ("|", ";", "&&"):
            found.append([])
        else:
            found[-1].append(word)
    return [part[: part.index(">")] if ">" in part else part for part in found]


def check_click(command, words):
    """Parse words as click would; a command that is named without any is only looked up."""
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(click.Context(command), list(words))
    if words:
        command.make_context(name, words, help_option_names=["-h", "--help"])


def check_pytest(words):
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word).exists(), word


def check_files(words):
    """Of pip and conda: the files that they are given."""
    for option, file in itertools.pairwise(words):
        assert option not in ("-c", "-f", "-r") or (ROOT / file).is_file(), file


def check_make(words):
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert any("=" not in word for word in words)
    assert done.returncode == 0, done.stderr


def check_mlflow(words):
    check_click(mlflow_cli, words)
    if words[0] == "run" and "-e" in words:
        entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
        entry = entries[words[words.index("-e") + 1]]
        given = [value.split("=")[0] for option, value in itertools.pairwise(words) if option == "-P"]
        assert set(given) <= set(entry["parameters"])


@cache
def options_of_kubectl(verb):
    told = subprocess.run(["kubectl", *verb.split(), "--help"], capture_output=True, text=True, check=True).stdout
    everywhere = {"-n", "--namespace", "--context"}
    return everywhere | set(re.findall(r"^\s+(-\w), --", told, re.MULTILINE)) | set(re.findall(r"(--[\w-]+)=", told))


def check_kubectl(words):
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    verb = " ".join(words[:3] if words[:2] == ["create", "secret"] and len(words) > 2 else words[:1])
    given = {word.split("=")[0] for word in words if word.startswith("-")}
    assert given <= options_of_kubectl(verb)
    places = dict(itertools.pairwise(words))
    if folder := places.get("-k"):
        subprocess.run(["kubectl", "kustomize", ROOT / folder], check=True, capture_output=True)
    if (file := places.get("-f")) and not file.startswith("-"):
        assert list(yaml.safe_load_all((ROOT / file).read_text()))
    if words[:2] == ["create", "secret"] and len(words) > 4:
        subprocess.run(["kubectl", *words, "--dry-run=client", "--output=yaml"], check=True, capture_output=True)


def check_python(words):
    if words[:2] == ["-m", "pipeline"]:
        check_click(cli, words[2:])
    elif words[:1] == ["-m"]:
        assert (ROOT / Path(*words[1].split("."))).with_suffix(".py").is_file()
    else:
        assert (ROOT / words[0]).is_file()


def check_accelerate(words):
    at = words.index("-m")
    assert {word for word in words[1:at] if word.startswith("-")} <= {"--num_processes", "--num_machines"}
    check_python(words[at:])


CHECKS = {
    "make": check_make,
    "mlflow": check_mlflow,
    "kubectl": check_kubectl,
    "python": check_python,
    "accelerate": check_accelerate,
    "pytest": check_pytest,
    "pip": check_files,
    "conda": check_files,
    "pre-commit": lambda words: words == ["install"] or pytest.fail("unknown"),
    "docker": lambda words: words[0] in ("tag", "push") or pytest.fail("unknown"),
    "curl": lambda words: None,
    "cat": lambda words: None,
    "export": lambda words: None,
    ".": lambda words: None,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_program_takes(command):
    for part in parts(command):
        CHECKS[part[0]](part[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_commands_are_shell(page):
    for block in blocks(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


QUICK = [command for command in COMMANDS if "--dry-run" in command and command.startswith("python ")]


@pytest.mark.parametrize("command", QUICK)
def test_a_quick_command_runs_as_it_is_written(command, run, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = run(*shlex.split(command)[3:])
    assert code == 0, err
    assert "nothing was trained" in out


@pytest.fixture(scope="module")
def place_with_a_student(data, vectors, tmp_path_factory):
    """A folder with a small student in ``my-student``, and a vectors file."""
    cpu = torch.device("cpu")
    cell = Cell(concepts=60, hidden_dim=8, epochs=1, layer=15)
    subset = data.subset(cell)
    [trained] = train_stack([cell], [subset], cpu)
    vocabulary = find_vocabulary(vectors, SHIPPED)
    home = tmp_path_factory.mktemp("snippets")
    (home / "vectors.safetensors").symlink_to(SHIPPED)
    export(checkpoint(cell, trained.parameters, subset, data, trained.metrics), data, vocabulary).save(
        home / "my-student"
    )
    return home


SNIPPETS = [(page.name, text) for page in PAGES for text in blocks(page, "python")]


@pytest.mark.parametrize(
    ("page", "text"), SNIPPETS, ids=[f"{page}{number}" for number, (page, _) in enumerate(SNIPPETS)]
)
def test_a_python_snippet_runs_as_it_is_written(page, text, place_with_a_student, monkeypatch, capsys):
    monkeypatch.chdir(place_with_a_student)
    exec(compile(text, page, "exec"), {})
    assert capsys.readouterr().out.count("\n") == 5 * text.count("print(")  # README: five concepts with their cosines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_yaml_block_is_a_grid(page, tmp_path):
    for number, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"grid{number}.yaml"
        path.write_text(text)
        assert len(read_grid(str(path)).cells) > 1


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


PLACE = re.compile(r"(?:pipeline|tests|docs|benchmarks|examples|k8s|data)/[\w./-]*")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    text = CODE.sub("", page.read_text())
    named = {name for name in re.findall(r"`([^`\s]+)`", text) if PLACE.fullmatch(name)}
    missing = {name for name in named if not (ROOT / name).exists()} - MADE
    assert not missing


def test_names_that_contributors_look_for_are_where_they_are_said_to_be():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([A-Z_]+)`(?: and `([A-Z_]+)`| or `([A-Z_]+)`)? in `(pipeline/[\w/]+\.py)`", text)
    assert len(named) > 10
    for *names, file in named:
        content = (ROOT / file).read_text()
        for name in filter(None, names):
            assert re.search(rf"^{name}\b", content, re.MULTILINE), f"{name} in {file}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        place = page.parent / target if target else page
        assert place.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", CODE.sub("", place.read_text()), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link


def test_no_page_or_manifest_names_a_host_that_is_not_an_example():
    for page in [*PAGES, *(ROOT / "k8s").rglob("*.yaml")]:
        for host in re.findall(r"(?:https?://|newName: |push |tag \S+ )([\w.-]+\.[a-z]+)[:/]", page.read_text()):
            assert host.endswith("example.com"), f"{page.name}: {host}"
