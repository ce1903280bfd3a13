"""The Dockerfile and the Kubernetes manifests: valid, safe, and with options that exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

from pipeline.cli import cli

VERSIONS = ("1.35", "1.36", "1.37")  # the three newest
FILES = [*sorted((ROOT / "k8s").glob("*-job.yaml")), ROOT / "k8s" / "mlflow.yaml"]
KUSTOMIZATIONS = [ROOT / "k8s", *sorted((ROOT / "k8s" / "overlays").iterdir())]


def objects(text):
    return list(yaml.safe_load_all(text))


def built(folder):
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    return subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout


def jobs(path):
    return [item for item in objects(path.read_text()) if item["kind"] == "Job"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_are_valid(path, version):
    for item in objects(path.read_text()):
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_kustomizations_build_valid_objects(folder):
    found = objects(built(folder))
    assert {"Job", "Deployment", "Service"} <= {item["kind"] for item in found}
    for item in found:
        kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
    [job] = [item for item in found if item["kind"] == "Job"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (folder.name != "cpu")


def test_the_number_of_shards_is_changed_in_one_place(tmp_path):
    shutil.copytree(ROOT / "k8s" / "base", tmp_path / "base")
    path = tmp_path / "base" / "sweep-job.yaml"
    path.write_text(path.read_text().replace("completions: 6", "completions: 8"))
    [job] = [item for item in objects(built(tmp_path / "base")) if item["kind"] == "Job"]
    shards = {one["name"]: one["value"] for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}["SHARDS"]
    assert (job["spec"]["parallelism"], shards) == (8, "8")


@pytest.mark.parametrize("place", [*FILES, *KUSTOMIZATIONS], ids=lambda path: path.name)
def test_pods_are_restricted_and_know_nothing_of_the_cluster(place):
    """What Pod Security's "restricted" demands, and more."""
    found = objects(built(place) if place.is_dir() else place.read_text())
    pods = [item["spec"]["template"]["spec"] for item in found if item["kind"] in ("Job", "Deployment")]
    assert pods
    for pod in pods:
        [container] = pod["containers"]
        assert "initContainers" not in pod
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["imagePullPolicy"] == "IfNotPresent"
        assert "memory" in container["resources"]["limits"]
        assert all(set(volume) <= {"name", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])


@pytest.mark.parametrize("place", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_server_and_sweep_fit_a_node_of_two_processors(place):
    processors = {"250m": 0.25, "500m": 0.5}
    needed = 0.0
    for item in objects(built(place)):
        if item["kind"] in ("Job", "Deployment"):
            [container] = item["spec"]["template"]["spec"]["containers"]
            needed += item["spec"].get("parallelism", 1) * processors[container["resources"]["requests"]["cpu"]]
    assert needed < 2


@pytest.mark.parametrize("path", FILES[:-1], ids=lambda path: path.name)
def test_jobs_forgive_disruptions_and_wait_for_the_server(path):
    [job] = jobs(path)
    spec = job["spec"]
    [container] = spec["template"]["spec"]["containers"]
    values = {one["name"]: one["value"] for one in container["env"]}
    assert spec["podReplacementPolicy"] == "Failed"
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["FailJob", "Ignore"]
    assert float(values["TRACKING_PATIENCE_SECONDS"]) > 60  # else pods that start before it fail the Job as wrong input
    if spec.get("completionMode") == "Indexed":
        assert str(spec["completions"]) == str(spec["parallelism"]) == values["SHARDS"]
        assert "--shard=$(JOB_COMPLETION_INDEX)/$(SHARDS)" in container["args"]


@pytest.mark.parametrize("path", FILES[:-1], ids=lambda path: path.name)
def test_jobs_use_options_that_exist(path):
    [job] = jobs(path)
    [container] = job["spec"]["template"]["spec"]["containers"]
    command = cli.commands[container["command"][-1]]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {argument.split("=")[0] for argument in container["args"]} <= known


def test_the_dockerfile_is_clean_and_fits_the_pinned_torch():
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE_IMAGE=nvidia/cuda:13\.0\.3-base", text, re.MULTILINE)
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text()  # its wheels ask for cuda-toolkit 13.0.3
