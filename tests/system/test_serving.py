"""A registered student behind MLflow's own server, over HTTP: right answers, and reasons where there is none."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import SHIPPED, free_port, fresh_database, wait_for

from pipeline import Student

CLIENTS = int(os.environ.get("TEST_CLIENTS", "16"))
SECONDS = float(os.environ.get("TEST_CLIENT_SECONDS", "5"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address of a served student, and the same student here."""
    home = tmp_path_factory.mktemp("served")
    uri = fresh_database(home / "mlflow.db")
    variables = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-m", "pipeline", "train", "--no-report",
               "--vectors", SHIPPED, "--concepts", "60", "--hidden-dim", "8",
               "--epochs", "1", "--output", home / "student", "--register", "concepts"]  # fmt: skip
    done = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/concepts@best", "--port", str(port),
         "--env-manager", "local"], cwd=home, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_for(port)
    yield f"http://127.0.0.1:{port}/invocations", Student.load(home / "student"), uri
    os.killpg(server.pid, signal.SIGKILL)


def ask(address, body, kind="application/json"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, content, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_answers_are_the_local_ones(served):
    address, student, _ = served
    texts = ["volcano", "slow cooking", "ὕβρις"]
    status, answer = ask(address, {"inputs": texts})
    assert status == 200, answer
    np.testing.assert_allclose(answer["predictions"], student.encode(texts), atol=1e-4)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"inputs": ["volc', "valid JSON"),
        (b"\xff\xfe", "valid JSON"),
        ([], "Received a list"),
        ({"inputs": []}, "0 texts; expected 1 to 100,000"),
        ({"inputs": [1, 2]}, "Expected type str, but got int"),
        ({"inputs": ["fine", None]}, "Expected type str, but got NoneType"),
        ({"inputs": "volcano"}, "Expected list, but got str"),
        ({"inputs": ["fine", ""]}, "text 1: empty"),
        ({"inputs": ["nul\0l"]}, "null byte"),
        ({"inputs": ["\ud800"]}, "half a character"),
        ({"inputs": ["x" * 10_000_000]}, "10,000,000 characters; expected 10,000 at the most"),
        ({"inputs": [["volcano"], ["a", "b"]]}, "Expected type str, but got list"),
        ({"texts": ["volcano"]}, "dictionary with 'inputs' key"),
    ],
    ids=range(13),
)
def test_what_is_no_text_gets_a_reason_and_the_server_lives(served, body, reason):
    address, student, _ = served
    status, answer = ask(address, body)
    assert 400 <= status < 500, answer
    assert reason in answer
    status, answer = ask(address, {"inputs": ["volcano"]})
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], student.encode(["volcano"]), atol=1e-4)


def test_many_clients_at_once_lose_no_answer(served):
    address, student, _ = served
    end = time.monotonic() + SECONDS

    def client(number):
        asked = 0
        while time.monotonic() < end:
            texts = [f"thing {number} {asked}", "volcano"]
            status, answer = ask(address, {"inputs": texts})
            assert status == 200, answer
            np.testing.assert_allclose(answer["predictions"], student.encode(texts), atol=1e-4)
            asked += 1
        return asked

    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = list(clients.map(client, range(CLIENTS)))
    assert min(asked) > 0


def test_the_registered_model_is_code_and_numbers(served):
    _, student, uri = served
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/concepts@best")
    assert str(model.metadata.signature.inputs) == "[string (required)]"
    assert model.metadata.saved_input_example_info is not None
    path = Path(mlflow.artifacts.download_artifacts("models:/concepts@best"))
    names = {file.name for file in path.rglob("*") if file.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not any(name.endswith((".pkl", ".pickle", ".pt")) for name in names)
    answer = model.predict(["volcano"])
    np.testing.assert_allclose(answer, student.encode(["volcano"]), atol=1e-5)
