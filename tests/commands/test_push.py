"""Students and vectors go to a hub and come back; nothing goes without a card or with an unstated licence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHIPPED
from hubserver import Hub
from processes import PATIENCE

from pipeline import Student

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub():
    server = Hub(TOKEN)
    yield server
    server.close()


@pytest.fixture
def python(hub, tmp_path):
    """Run Python with that hub as its hub."""

    def call(*arguments, token=TOKEN):
        variables = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
                     "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}  # fmt: skip
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def folder(workplace, run, tiny_folder):
    """A student of a tiny teacher whose licence nobody knows, beside its vectors."""
    arguments = ("extract", "--teacher", tiny_folder("gpt2"), "--layers", "2", "--num-concepts", 120, "--concepts",
                 ROOT / "data" / "concepts.csv", "--output", "tiny.safetensors")  # fmt: skip
    assert run(*arguments)[0] == 0
    code, _, err = run(
        "train", "--vectors", "tiny.safetensors", "--concepts", 40, "--epochs", 1, "--no-report", "--output", "mine"
    )
    assert code == 0, err
    return workplace / "mine"


@pytest.mark.system
def test_a_student_goes_to_the_hub_and_comes_back(hub, python, folder):
    done = python("-m", "pipeline", "push", folder, "me/mine")
    assert done.returncode == 2
    assert "licence of its teacher is not known; state it with --licence" in done.stderr
    assert hub.files == {}
    done = python("-m", "pipeline", "push", folder, "me/mine", "--licence", "mit")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("hf://me/mine")
    files = hub.files["models/me/mine"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert b"license: mit" in files["README.md"]
    done = python("-m", "pipeline", "predict", "--run", "hf://me/mine", "volcano")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout)["vector"], Student.load(folder).encode("volcano"), atol=1e-5)
    (folder / "README.md").unlink()
    done = python("-m", "pipeline", "push", folder, "me/mine", "--licence", "mit")
    assert done.returncode == 2
    assert "has no card" in done.stderr


@pytest.mark.system
def test_a_vectors_file_goes_to_the_hub_and_comes_back(hub, python, workplace):
    done = python("-m", "pipeline", "push", SHIPPED, "me/vectors")
    assert done.returncode == 0, done.stderr
    place = done.stdout.strip().splitlines()[-1]
    assert place == f"hf://datasets/me/vectors/{SHIPPED.name}"
    files = hub.files["datasets/me/vectors"]
    assert files[SHIPPED.name] == SHIPPED.read_bytes()
    assert b"license: apache-2.0" in files["README.md"]
    code = (
        "import sys; from pathlib import Path; from pipeline.tracking import fetch; "
        f"sys.exit(fetch({place!r}).read_bytes() != Path({str(SHIPPED)!r}).read_bytes())"
    )
    assert python("-c", code).returncode == 0


@pytest.mark.system
@pytest.mark.parametrize(
    ("arguments", "token", "exit_code", "complaint"),
    [
        (("push", "SHIPPED", "vectors"), TOKEN, 2, "expected owner/name"),
        (("push", "nothing", "me/mine"), TOKEN, 2, "neither a student folder nor a vectors file"),
        (("push", "SHIPPED", "me/mine"), "hf_wrongwrongwrong", 2, "log in with: hf auth login"),
        (("predict", "--run", "hf://me/none", "a"), TOKEN, 2, "hf://me/none: not found"),
        (("predict", "--run", "hf://mine", "a"), TOKEN, 2, "expected hf://owner/name"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(python, workplace, arguments, token, exit_code, complaint):
    arguments = [str(SHIPPED) if part == "SHIPPED" else part for part in arguments]
    done = python("-m", "pipeline", *arguments, token=token)
    assert done.returncode == exit_code
    assert complaint in done.stderr.splitlines()[-1]
    assert not Path("mine").exists()
