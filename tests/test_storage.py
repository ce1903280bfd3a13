"""Files in S3: a real S3 server, and one that fails."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import SECRET, SHIPPED
from mlflow import MlflowClient

from pipeline import s3 as s3_module
from pipeline import storage
from pipeline.errors import InputError, WorkError
from pipeline.s3 import PART_BYTES, first_bytes, object_names, remove_objects

CSV = "concept,category\n" + "".join(f"{name},any\n" for name in ("ice", "fire", "slow cooking", "rain", "sun", "moon"))


@pytest.fixture
def big(tmp_path):
    """A file that goes up in three parts."""
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(2 * PART_BYTES + 12345))
    return path


def test_a_file_comes_back_as_it_went(s3, big, tmp_path):
    storage.upload(big, "s3://bucket/deep/big.bin")
    storage.download("s3://bucket/deep/big.bin", tmp_path / "back")
    assert storage.sha256_of(tmp_path / "back") == storage.sha256_of(big)
    assert object_names("s3://bucket/deep") == {"big.bin"}
    assert object_names("s3://bucket/dee") == set()
    assert first_bytes("s3://bucket/deep/big.bin", 10) == big.read_bytes()[:10]
    assert storage.fetch("s3://bucket/deep").joinpath("big.bin").stat().st_size == big.stat().st_size
    remove_objects("s3://bucket/deep")
    assert object_names("s3://bucket") == set()


def test_of_several_that_create_the_first_one_wins(s3, tmp_path):
    for place in ("s3://bucket/plan.json", f"{tmp_path}/folder/plan.json"):
        assert storage.write_if_absent(place, "first") == "first"
        assert storage.write_if_absent(place, "second") == "first"


@pytest.mark.parametrize(
    ("place", "changes", "expected"),
    [
        ("s3://bucket/none", {}, "s3://bucket/none: not found"),
        ("s3://nowhere/x", {}, "no such bucket"),
        ("s3://", {}, "expected s3://bucket/key"),
        ("s3://bucket/x", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "AWS_SECRET_ACCESS_KEY does not fit"),
        ("s3://bucket/x", {"AWS_ACCESS_KEY_ID": "someone-else"}, "does not know the AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x", {"AWS_REQUEST_CHECKSUM_CALCULATION": "never"}, "request_checksum_calculation"),
        ("s3://bucket/x", {"AWS_PROFILE": "nobody"}, "profile (nobody) could not be found"),
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": "nowhere"}, "Invalid endpoint: nowhere"),
        ("s3://bucket/x", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials"),
    ],
)
def test_what_is_wrong_with_a_store_is_said_in_one_line(s3, monkeypatch, run, workplace, place, changes, expected):
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    code, _, err = run("train", "--vectors", place)
    assert code == 2
    assert expected in err.splitlines()[-1]
    assert SECRET not in err


def test_a_store_that_fails_every_third_request_or_is_slow_costs_only_time(s3, big, tmp_path):
    for fault in ({"every": 3}, {"delay": 0.3}):
        vars(s3).update({"every": 0, "delay": 0.0, **fault})
        storage.upload(big, "s3://bucket/big.bin")
        storage.download("s3://bucket/big.bin", tmp_path / "back")
        assert storage.sha256_of(tmp_path / "back") == storage.sha256_of(big)


def test_a_store_without_checksum_headers_takes_what_boto3_is_told_not_to_check(s3, big, tmp_path, monkeypatch, caplog):
    s3.strict = True
    for make in (
        lambda: storage.upload(big, "s3://bucket/big.bin"),
        lambda: storage.write_if_absent("s3://bucket/plan", "first"),
    ):
        with pytest.raises(InputError, match="set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
            make()
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    s3_module.client.cache_clear()
    s3_module.warn_once.cache_clear()
    (tmp_path / "small").write_text("small")
    for name in ("big.bin", "small"):
        storage.upload(tmp_path / name, f"s3://bucket/{name}")
        storage.download(f"s3://bucket/{name}", tmp_path / "back")
        assert storage.sha256_of(tmp_path / "back") == storage.sha256_of(tmp_path / name)
    assert storage.write_if_absent("s3://bucket/plan", "first") == "first"
    assert caplog.text.count("the store does not check what it receives") == 1
    assert "by their size alone" not in caplog.text  # for their SHA-256 travels with them
    for name in ("c.csv", "d.csv"):
        s3_module.client().put_object(Bucket="bucket", Key=name, Body=CSV.encode())  # as other programs do
        assert storage.fetch(f"s3://bucket/{name}").read_text() == CSV
    assert caplog.text.count("by their size alone") == 1
    s3.flip = True
    with pytest.raises(WorkError, match="not what was uploaded"):
        storage.download("s3://bucket/small", tmp_path / "back")


@pytest.mark.parametrize("error", [(501, "NotImplemented"), (400, "InvalidArgument"), (400, "InvalidRequest")])
def test_a_store_without_conditions_keeps_what_is_there(s3, error):
    s3.unconditional = error
    assert storage.write_if_absent("s3://bucket/plan.json", "first") == "first"
    assert storage.write_if_absent("s3://bucket/plan.json", "second") == "first"


@pytest.mark.parametrize("error", [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict")])
def test_of_several_that_create_at_once_those_that_lose_find_the_first_one(s3, error):
    s3.unconditional = error
    with ThreadPoolExecutor(1) as other:
        made = other.submit(storage.write_if_absent, "s3://bucket/plan.json", "second")
        while not s3.count:
            time.sleep(0.01)
        s3_module.client().put_object(Bucket="bucket", Key="plan.json", Body=b"first")
        assert made.result() == "first"


def test_a_store_that_dies_in_mid_upload_shows_no_partial_object(s3, big, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_module, "ATTEMPTS", 2)
    s3_module.client.cache_clear()
    s3.after = PART_BYTES + 1000
    with pytest.raises(WorkError, match="the store does not answer"):
        storage.upload(big, "s3://bucket/big.bin")
    s3.after = None
    assert object_names("s3://bucket") == set()
    storage.upload(big, "s3://bucket/big.bin")
    assert object_names("s3://bucket") == {"big.bin"}


def test_a_copy_that_is_not_what_was_uploaded_is_refused(s3, tmp_path):
    (tmp_path / "a").write_text("right")
    storage.upload(tmp_path / "a", "s3://bucket/a")
    s3.flip = True
    with pytest.raises(WorkError, match="not what was uploaded"):
        storage.download("s3://bucket/a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_output_in_s3_that_is_something_else_is_not_written_over(s3, workplace, run, tiny_folder):
    Path("c.csv").write_text(CSV)
    storage.upload(Path("c.csv"), "s3://bucket/c.csv")
    code, _, err = run("extract", "--teacher", tiny_folder("gpt2"), "--concepts", "s3://bucket/c.csv", "--output",
                       "s3://bucket/c.csv")  # fmt: skip
    assert code == 2
    assert "s3://bucket/c.csv: exists, and is no vectors file" in err


@pytest.mark.system
def test_copies_of_artifacts_are_gone_when_the_command_ends(workplace, run):
    code, _, err = run("train", "--vectors", SHIPPED, "--concepts", 30, "--student", "ridge", "--no-report",
                       "--register", "mine", "--output", "student")  # fmt: skip
    assert code == 0, err
    (workplace / "temporary").mkdir()
    registered = MlflowClient().get_model_version_by_alias("mine", "best")
    for place in ("models:/mine@best", f"runs:/{registered.run_id}"):
        command = [sys.executable, "-m", "pipeline", "predict", "--run", place, "volcano", "--output", "out.npy"]
        variables = {**os.environ, "TMPDIR": str(workplace / "temporary")}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert list((workplace / "temporary").iterdir()) == []
