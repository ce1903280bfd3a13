"""The Dockerfile and the Kubernetes manifests: valid, safe, and with options that exist."""

import itertools
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
K8S = ROOT / "k8s"
FILES = [*sorted(K8S.glob("*-job.yaml")), K8S / "mlflow.yaml"]
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
# What kubectl apply -k takes: all but the components.
KUSTOMIZATIONS = sorted(path.parent for path in K8S.rglob("kustomization.yaml") if "components" not in path.parts)
WITH_SERVER = [folder for folder in KUSTOMIZATIONS if "base/server" in (folder / "kustomization.yaml").read_text()]
JOBS = {"sweep", "train", "extract"}


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


def named(folder):
    """A kustomization's folder, as test ids and commands have it."""
    return str(folder.relative_to(ROOT))


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=named)
def test_kustomizations_build_valid_objects(folder):
    found = objects(built(folder))
    kinds = {item["kind"] for item in found}
    assert ({"Deployment", "Service"} <= kinds) == (folder in WITH_SERVER or folder.name == "server")
    for item in found:
        kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
    for job in (item for item in found if item["kind"] == "Job"):
        [container] = job["spec"]["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == ("cpu" not in folder.name.split("-"))


def test_every_job_has_a_kustomization_with_and_one_without_gpus():
    found = {True: set(), False: set()}
    for folder in KUSTOMIZATIONS:
        for item in objects(built(folder)):
            if item["kind"] == "Job":
                limits = item["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
                found["nvidia.com/gpu" in limits].add(item["metadata"]["labels"]["app.kubernetes.io/component"])
    assert found == {True: JOBS, False: JOBS}


def test_kustomizations_name_the_command_that_applies_them():
    for folder in KUSTOMIZATIONS:
        command = "k8s/" if folder == K8S else named(folder)
        assert (folder / "kustomization.yaml").read_text().startswith(f"# kubectl apply -k {command}:")


def test_all_components_can_be_combined(tmp_path):
    shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
    own = tmp_path / "k8s" / "overlays" / "own"
    own.mkdir()
    for number in range(len(COMPONENTS) + 1):
        for components in itertools.combinations(COMPONENTS, number):
            content = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"../../base/{name}" for name in ("server", *JOBS)],
                "components": [f"../../components/{name}" for name in components],
            }
            (own / "kustomization.yaml").write_text(yaml.safe_dump(content))
            found = objects(built(own))
            for item in found:
                kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
            volumes = [item for item in found if item["kind"] == "PersistentVolumeClaim"]
            assert bool(volumes) == ("postgres-s3" not in components)
            for job in (item for item in found if item["kind"] == "Job"):
                limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
                assert ("nvidia.com/gpu" in limits) == ("cpu" not in components)
                assert job["spec"].get("suspend", False) == ("kueue" in components)


@pytest.mark.parametrize(
    ("choice", "image"),
    [
        ('newTag: "0.1.0"', "registry.example.com/team/activation-distillation:0.1.0"),
        (f"digest: sha256:{64 * 'a'}", f"registry.example.com/team/activation-distillation@sha256:{64 * 'a'}"),
    ],
    ids=["tag", "digest"],
)
def test_one_place_names_the_image_of_all_pods(choice, image, tmp_path):
    """As the comments in that place tell to: its lines without their "#"."""
    shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
    path = tmp_path / "k8s" / "components" / "image" / "kustomization.yaml"
    example = path.read_text().replace("# newName", "newName").replace("    newTag: latest\n", "")
    path.write_text(re.sub(r"# newTag: .*", choice, example))
    for folder in KUSTOMIZATIONS:
        text = built(tmp_path / folder.relative_to(ROOT))
        assert set(re.findall(r"\bimage: (.*)", text)) == {image}


def test_the_commands_for_logs_follow_all_pods_of_two_sweeps():
    """kubectl follows five pods at the most, unless it is told otherwise."""
    [sweep] = jobs(K8S / "sweep-job.yaml")
    commands = [
        command
        for path in (ROOT / "README.md", ROOT / "docs" / "deploy.md", K8S / "sweep-job.yaml")
        for command in re.findall(r"kubectl logs -f .*", path.read_text())
    ]
    assert len(commands) >= 3
    for command in commands:
        [label] = re.findall(r"-l app.kubernetes.io/component=(\w+) --prefix", command)
        assert label == sweep["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        [most] = re.findall(r"--max-log-requests=(\d+)", command)
        assert int(most) >= 2 * sweep["spec"]["parallelism"]


@pytest.mark.parametrize("path", FILES[:-1], ids=lambda path: path.name)
def test_a_job_says_how_it_is_run_again(path):
    """A Job's template is immutable: to apply it again changes nothing, to apply it with other arguments fails."""
    [job] = jobs(path)
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"kubectl apply -f k8s/{path.name}" in line for line in comments)
    assert any(f"kubectl delete job {job['metadata']['name']}" in line for line in comments)


def test_a_second_sweep_stands_beside_the_first():
    [first] = jobs(K8S / "sweep-job.yaml")
    [second] = objects(built(K8S / "overlays" / "second-sweep"))
    assert second["metadata"]["name"] != first["metadata"]["name"]
    one, other = (set(job["spec"]["template"]["spec"]["containers"][0]["args"]) for job in (first, second))
    assert one != other
    assert "--shard=$(JOB_COMPLETION_INDEX)/$(SHARDS)" in one & other
    known = {name for parameter in cli.commands["sweep"].params for name in parameter.opts}
    assert {argument.split("=")[0] for argument in other} <= known


@pytest.mark.parametrize("name", ["sweep", "extract"])
def test_the_number_of_shards_is_changed_in_one_place(name, tmp_path):
    shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
    path = tmp_path / "k8s" / "base" / name / f"{name}-job.yaml"
    path.write_text(re.sub(r"completions: \d+", "completions: 8", path.read_text()))
    [job] = objects(built(path.parent))
    shards = {one["name"]: one["value"] for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}["SHARDS"]
    assert (job["spec"]["parallelism"], shards) == (8, "8")


@pytest.mark.parametrize("place", [*FILES, *KUSTOMIZATIONS], ids=named)
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


@pytest.mark.parametrize("place", WITH_SERVER, ids=named)
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
