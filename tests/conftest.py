"""Real parts for the tests: the shipped vectors, the embedded teacher, and tiny random models of real architectures."""

import atexit
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

# Before any library reads them: tests reach no hub, and every run goes to a database of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # three more processes a server, of no use to tracking
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)
# A shell ignores SIGINT in what it starts in the background, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent
# What tests start runs this checkout, on the Python that the tests were started with (see elsewhere/sitecustomize.py).
given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(str(Path(path).absolute()) for path in given if path)])
ELSEWHERE = os.pathsep.join([str(ROOT / "tests" / "elsewhere"), os.environ["PYTHONPATH"]])
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Tests run side by side: each worker, with the processes that it starts, takes its share of the cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, CORES // workers))

import mlflow
import pytest
import torch
from containers import IMAGE, docker
from faults import Faulty
from forked import Command
from mlflow import MlflowClient
from processes import wait_until
from shapes import check_shapes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from vocabularies import find_vocabulary

from pipeline import cli
from pipeline.data.concepts import read_catalogue
from pipeline.data.dataset import Dataset
from pipeline.data.vectors import read_vectors
from pipeline.s3 import client
from pipeline.teachers.find import find_teacher
from pipeline.teachers.load import load_teacher

check_shapes()
SHIPPED = ROOT / "data" / "vectors" / "smollm2-135m.safetensors"
CATALOGUE = ROOT / "data" / "concepts.csv"

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=600),
    "qwen3": Qwen3Config(**SIZES, **HEADS, vocab_size=600),
    "llama": LlamaConfig(**SIZES, **HEADS, vocab_size=600),
    # Every second block sees four tokens back.
    "gemma3": Gemma3TextConfig(
        **SIZES, **HEADS, vocab_size=600, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES, vocab_size=600),
}
# Architectures whose attention cannot be exchanged: a state-space model, and one with ALiBi biases.
WHOLE = {
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=4, state_size=8, vocab_size=600),
    "bloom": BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=600),
}


@pytest.fixture(scope="session")
def catalogue():
    return read_catalogue(str(CATALOGUE))


@pytest.fixture(scope="session")
def vectors():
    return read_vectors(SHIPPED)


@pytest.fixture(scope="session")
def data(vectors):
    return Dataset(vectors)


@pytest.fixture(scope="session")
def templates():
    """The shipped vectors of four templates at one block."""
    return Dataset(read_vectors(SHIPPED.with_name("smollm2-135m-templates.safetensors")))


# Files whose tests take longest, which begin first so that no worker is left alone with one at the end.
LONG = (
    "test_mlflow_run", "test_resilience", "test_container", "test_interrupts", "test_reader", "test_run",
    "test_tracking_server", "test_storage", "test_predict", "test_student", "test_rows", "test_cli",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first; what stands in tests/system is marked so, like single tests elsewhere that take long."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.path.parent.name == "system" and not item.get_closest_marker("short"):
            item.add_marker(pytest.mark.system)


def pytest_sessionstart(session):
    """The vocabulary of the shipped vectors is made once, before the workers start and each makes its own."""
    if not hasattr(session.config, "workerinput"):
        find_vocabulary(read_vectors(SHIPPED), SHIPPED)


def pytest_xdist_auto_num_workers():
    """Workers of ``-n auto``: one per core that this process may use."""
    return CORES


@pytest.fixture(scope="session")
def smollm2():
    """The embedded teacher with its real weights."""
    source = find_teacher("smollm2-135m")
    return source, load_teacher(source)


def _tokenizer(texts, begin):
    """A small byte-level BPE tokenizer, trained on the catalogue; ``begin`` puts a token before every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    if begin:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>")


@pytest.fixture(scope="session")
def tiny_folder(catalogue, tmp_path_factory):
    """Folders with tiny random models, as `save_pretrained` leaves them: ``tiny_folder("gpt2")``."""
    made = {}

    def make(architecture):
        if architecture not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(architecture)
            model = AutoModelForCausalLM.from_config((ARCHITECTURES | WHOLE)[architecture])
            with torch.no_grad():  # random norms and biases too, so that nothing is right by accident
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            model.save_pretrained(folder)
            _tokenizer(catalogue.concepts, begin=architecture in ("llama", "gemma3")).save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


@functools.cache
def _template():
    """An empty tracking database: MLflow takes seconds to make one."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def fresh_database(path):
    """Make an empty tracking database, where there is none, and give its address."""
    if not path.exists():
        shutil.copy(_template(), path)
    return f"sqlite:///{path}"


def move_to(folder, monkeypatch):
    """Make a folder the current one, with a tracking database in it."""
    monkeypatch.chdir(folder)
    uri = fresh_database(folder / "mlflow.db")
    mlflow.set_tracking_uri(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder with a fresh tracking database in it."""
    move_to(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command line in this process: ``code, out, err = run("sweep", "--grid", "scaling")``."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        return code, *capfd.readouterr()

    return call


def free_port():
    """A port of no one, and not one of those that the kernel gives to clients: a server that restarts finds it free."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def wait_for(port):
    """Wait until something listens."""

    def listens():
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        return False

    wait_until(listens, step=0.1)


@contextmanager
def mlflow_server(port, folder=None):
    """A real tracking server on a database in a folder, by default the current one, with artifacts through it."""
    folder = folder or Path.cwd()
    process = Command(
        "server", "--backend-store-uri", fresh_database(folder / "server.db"), "--port", port,
        "--artifacts-destination", "artifacts", "--workers", "1", module="mlflow", folder=folder, new_session=True,
        quiet=True,
    )  # fmt: skip
    try:
        wait_for(port)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


KEY, SECRET = "accesskey", "secretsecret"


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """A real S3 server over a folder with one bucket; the environment names it."""
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    port = free_port()
    server = subprocess.Popen(
        [Path(sys.executable).with_name("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key",
         f"{KEY},{SECRET}", tmp_path / "store"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "RCLONE_CONFIG": str(tmp_path / "rclone.conf")},
    )  # fmt: skip
    wait_for(port)
    proxy = Faulty(port)
    for name, value in (("AWS_ENDPOINT_URL", proxy.url), ("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client.cache_clear()
    yield proxy
    proxy.close()
    server.kill()
    server.wait()
    client.cache_clear()


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The image, built on TEST_BASE_IMAGE where that is set, or as `make image` has left it."""
    if shutil.which("docker") is None or docker("info", check=False).returncode:
        pytest.skip("needs a Docker engine")
    if base := os.environ.get("TEST_BASE_IMAGE"):
        make = ["make", "image", f"BASE_IMAGE={base}", "DOCKER_FLAGS=--network host"]
        lock = os.environ.get("TEST_IMAGE_LOCK", str(tmp_path_factory.getbasetemp().parent / "image.lock"))
        done = subprocess.run(["flock", lock, *make], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    elif docker("image", "inspect", IMAGE, check=False).returncode:
        pytest.skip("needs the image: make image")
    return IMAGE


SMALL_GRID = """
fixed: {epochs: 3, batch_size: 16}
axes:
  concepts: [20, 40]
  hidden_dim: [8, 16]
"""


@pytest.fixture
def small_grid(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL_GRID)
    return path
