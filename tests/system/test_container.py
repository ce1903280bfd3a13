"""The image on a real Docker engine: what it holds, what it leaves, and a sweep of pods on a real server."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import KEY, SECRET, SHIPPED, free_port, fresh_database, wait_for
from containers import IMAGE, docker
from mlflow import MlflowClient
from processes import wait_until

SHARDS = int(os.environ.get("TEST_SHARDS", "2"))
LIMITED = ("--read-only", "--tmpfs", "/tmp", "--user", "12345:12345", "--cap-drop", "ALL")
pytestmark = pytest.mark.timeout(900)


def test_the_image_holds_the_program_and_nothing_else(image):
    layers = [json.loads(line) for line in docker("history", "--format", "{{json .}}", image).splitlines()]
    own = 0.0
    for layer in layers:
        if "/opt/venv" in layer["CreatedBy"]:  # what follows is base and packages
            break
        number, unit = re.fullmatch(r"([\d.]+)([kM]?B)", layer["Size"]).groups()
        own += float(number) * {"B": 1e-6, "kB": 1e-3, "MB": 1.0}[unit]
    assert own < 30
    assert docker("run", "--rm", "--entrypoint", "find", image, "/opt/venv", "-type", "d", "-name", "tests") == ""
    look = "ls -A /opt/activation-distillation /tmp; ls ~root/.cache /var/lib/apt/lists 2>&1; id -u; command -v gcc pip"
    found = docker("run", "--rm", "--entrypoint", "sh", image, "-c", f"{look}; true")
    for absent in ("tests", "benchmarks", ".git", "/gcc", "/pip", "InRelease", "templates"):
        assert absent not in found
    assert "65532" in found
    told = docker("image", "inspect", image)
    assert not re.search(r"PASSWORD|SECRET|TOKEN", told)
    assert "org.opencontainers.image.licenses" in told


@pytest.fixture
def scratch(tmp_path):
    """A folder that any user may write to, with an empty tracking database in it."""
    tmp_path.chmod(0o777)
    fresh_database(tmp_path / "mlflow.db")
    (tmp_path / "mlflow.db").chmod(0o666)
    return tmp_path


def test_any_user_can_run_it_on_a_read_only_root(image, scratch):
    common = ("run", "--rm", *LIMITED, "-v", f"{scratch}:/scratch",
              "-e", "MLFLOW_TRACKING_URI=sqlite:////scratch/mlflow.db")  # fmt: skip
    docker(*common, image, "python", "-m", "pipeline", "train", "--no-report",
           "--epochs", "1", "--concepts", "40", "--output",
           "/scratch/student")  # fmt: skip
    assert (scratch / "student" / "model.safetensors").stat().st_uid == 12345
    told = docker(*common, image, "python", "-m", "pipeline", "train", "--epochs", "1", "--output", "/opt/student",
                  check=False)  # fmt: skip
    assert told.returncode == 2
    assert "/opt/student" in told.stderr.splitlines()[-1]
    assert "Read-only file system" in told.stderr.splitlines()[-1]
    before = {path: path.stat().st_mtime_ns for path in (scratch / "student").iterdir()}
    read_only = ("-v", f"{scratch}/student:/volume:ro")
    told = docker(*common, *read_only, image, "python", "-m", "pipeline", "train", "--no-report",
                  "--epochs", "2", "--concepts", "40",
                  "--output", "/volume", check=False)  # fmt: skip
    assert told.returncode == 2
    assert "Read-only file system" in told.stderr.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in (scratch / "student").iterdir()} == before


def test_a_full_disk_is_said_in_one_line(image):
    told = docker("run", "--rm", *LIMITED, "--tmpfs", "/scratch:size=3m,mode=1777", "-e",
                  "MLFLOW_TRACKING_URI=sqlite:////tmp/mlflow.db", image, "sh", "-c",
                  "python -m pipeline train --epochs 1 --concepts 40 --hidden-dim 1024 --output /scratch/student; "
                  "code=$?; find /scratch -type f; exit $code", check=False)  # fmt: skip
    assert told.returncode == 1
    assert "No space left on device" in told.stderr.splitlines()[-1]
    assert "Traceback" not in told.stderr
    assert not any(name in told.stdout for name in (".part", "config.json", "cell.json"))  # nothing that looks whole


def test_a_stop_of_the_container_closes_the_runs(image, scratch):
    uri = "sqlite:////scratch/mlflow.db"
    name = f"stop-{os.getpid()}"
    docker("run", "--detach", "--name", name, *LIMITED, "-v", f"{scratch}:/scratch", "-e",
           f"MLFLOW_TRACKING_URI={uri}", image, "accelerate", "launch", "--quiet", "--num_processes", "1",
           "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "pipeline", "train",
           "--epochs", "100000", "--output", "/scratch/student")  # fmt: skip
    client = MlflowClient(f"sqlite:///{scratch}/mlflow.db")
    wait_for_runs(client, "tags.role = 'cell'")
    time.sleep(2)
    docker("stop", "-t", "30", name)  # what Kubernetes gives
    assert docker("inspect", "--format", "{{.State.ExitCode}}", name).strip() == "130"  # 137, were it killed
    docker("rm", name)
    runs = client.search_runs([client.get_experiment_by_name(IMAGE).experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}


def wait_for_runs(client, condition):
    """Wait until the experiment has a run of which the condition holds."""

    def found():
        experiment = client.get_experiment_by_name(IMAGE)
        return experiment and client.search_runs([experiment.experiment_id], condition)

    wait_until(found, step=0.5)


@contextmanager
def postgres(folder):
    """A real PostgreSQL; its port. Its own user, for it does not run as root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("needs PostgreSQL")
    home, port = folder / "postgres", free_port()
    home.mkdir()
    for path in (*folder.parents, folder):
        if str(path).startswith("/tmp/"):
            path.chmod(0o755)
    owner = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    if owner:
        shutil.chown(home, **owner)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": home, **owner}
    subprocess.run([found[-1].with_name("initdb"), "-D", home / "data", "-A", "trust", "-U", "me"], check=True, **quiet)
    command = [found[-1], "-D", home / "data", "-p", str(port), "-k", home, "-h", "127.0.0.1"]
    server = subprocess.Popen(command, **quiet)
    wait_for(port)

    def restart():
        nonlocal server
        server.send_signal(signal.SIGINT)
        server.wait()
        time.sleep(1)
        server = subprocess.Popen(command, **quiet)
        wait_for(port)

    try:
        yield port, restart
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()


@pytest.fixture
def tracking(image, s3, tmp_path):
    """The image's own MLflow server on PostgreSQL with artifacts in S3: its address, and how to restart PostgreSQL."""
    with postgres(tmp_path) as (database, restart):
        port, name = free_port(), f"mlflow-{os.getpid()}"
        docker("run", "--detach", "--rm", "--name", name, "--network", "host", *LIMITED,
               "-e", f"MLFLOW_BACKEND_STORE_URI=postgresql://me@127.0.0.1:{database}/postgres",
               "-e", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false",
               "-e", "MLFLOW_ARTIFACTS_DESTINATION=s3://bucket/artifacts", "-e", f"AWS_ENDPOINT_URL={s3.url}",
               "-e", f"MLFLOW_S3_ENDPOINT_URL={s3.url}", "-e", f"AWS_ACCESS_KEY_ID={KEY}",
               "-e", f"AWS_SECRET_ACCESS_KEY={SECRET}", image, "mlflow", "server", "--host", "127.0.0.1", "--port",
               port, "--workers", "2")  # fmt: skip
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}", restart
        finally:
            docker("kill", name, check=False)


GRID = """
fixed: {epochs: 15, concepts: 300}
axes: {hidden_dim: [64, 128, 192], layers: [1, 2], learning_rate: [0.001, 0.002]}
"""
CELLS = 12


def pod(uri, folder, index, name):
    """A container as a pod of k8s/sweep-job.yaml is: the index in the environment, nothing shared but the server."""
    home = folder / f"pod{index}"
    home.mkdir(exist_ok=True)
    home.chmod(0o777)
    docker("run", "--detach", "--name", name, "--network", "host", *LIMITED, "-v", f"{home}:/scratch", "-v",
           f"{folder}/grid.yaml:/grid.yaml:ro", "-e", f"MLFLOW_TRACKING_URI={uri}",
           "-e", "TRACKING_PATIENCE_SECONDS=600", "-e", f"JOB_COMPLETION_INDEX={index}", IMAGE, "sh", "-c",
           f"exec python -m pipeline sweep --grid /grid.yaml --output /scratch/results "
           f"--shard $JOB_COMPLETION_INDEX/{SHARDS}")  # fmt: skip


def test_pods_make_up_one_sweep_even_if_each_is_killed_once(tracking, workplace, run):
    uri, restart = tracking
    Path("grid.yaml").write_text(GRID)
    names = [f"pod-{os.getpid()}-{index}" for index in range(SHARDS)]
    twin = f"pod-{os.getpid()}-twin"
    try:
        for index, name in enumerate(names):
            pod(uri, workplace, index, name)
        wait_for_runs(MlflowClient(uri), "tags.role = 'cell' AND attributes.status = 'FINISHED'")
        for name in names:
            docker("kill", "--signal", "KILL", name, check=False)
        restart()
        for name in names:
            docker("start", name)
        pod(uri, workplace, 0, twin)  # and two with one index
        codes = [docker("wait", name).strip() for name in (*names, twin)]
        logs = [docker("logs", name, check=False) for name in (*names, twin)]
    finally:
        docker("rm", "--force", *names, twin, check=False)
    assert set(codes) == {"0"}, "\n".join(
        log.stderr[-3000:] for log, code in zip(logs, codes, strict=True) if code != "0"
    )
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(IMAGE).experiment_id])
    [parent] = [one for one in found if one.data.tags.get("role") == "sweep"]
    cells = [one for one in found if one.data.tags.get("role") == "cell"]
    assert parent.info.status == "FINISHED"
    assert Counter(one.info.status for one in cells) == {"FINISHED": CELLS}
    assert len({one.data.tags["cell_key"] for one in cells}) == CELLS
    names = [item.path for item in client.list_artifacts(parent.info.run_id)]
    assert len([name for name in names if name.endswith("_report.html")]) == 1
    assert not any(SECRET in log.stderr + log.stdout for log in logs)
    code, _, err = run("sweep", "--grid", "grid.yaml", "--vectors", SHIPPED, "--no-report", "--output", "whole")
    assert code == 0, err
    [path] = Path("whole").glob("*.json")
    whole = {cell["name"]: cell["test_cosine"] for cell in json.loads(path.read_text())["cells"]}
    assert {one.info.run_name: one.data.metrics["test_cosine"] for one in cells} == pytest.approx(whole, abs=2e-3)
