"""The Hugging Face hub: students and vectors files, there and back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.card import UNSTATED, vectors_card
from pipeline.errors import InputError, WorkError

SCHEME = "hf://"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


def fetch(place: str) -> Path:
    """A student folder or a vectors file of the hub, on this machine.

    Args:
        place: ``hf://owner/name`` for a student, ``hf://datasets/owner/name/file`` for a file; ``@revision`` may follow
            the name.

    Raises:
        InputError: no such place, or it may not be read.
        WorkError: the hub does not answer.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    kind, repo, revision, name = _parse(place)
    with _told(place):
        if name:
            return Path(hf_hub_download(repo, name, repo_type=kind, revision=revision))
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=list(FILES)))


def _parse(place: str) -> tuple[str, str, str | None, str]:
    path = place.removeprefix(SCHEME)
    kind = "dataset" if path.startswith("datasets/") else "model"
    owner, _, rest = path.removeprefix("datasets/").partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name or (kind == "dataset" and not file):
        raise InputError(f"{place}: expected hf://owner/name, or hf://datasets/owner/name/file")
    return kind, f"{owner}/{name}", revision or None, file


def push(source: Path, repo: str, licence: str | None = None, private: bool = False) -> str:
    """Publish a student folder, or a vectors file, with its card; its address.

    Args:
        source: a student folder, or a vectors file.
        repo: ``owner/name``.
        licence: the teacher's, where the student or the program does not know it.
        private: make a new repository private.

    Raises:
        InputError: no student and no vectors file, no card, or a teacher whose licence is not stated.
        WorkError: the hub does not answer.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise InputError(f"{repo}: expected owner/name")
    with tempfile.TemporaryDirectory() as home:
        kind = (_stage_student if source.is_dir() else _stage_vectors)(source, Path(home), licence)
        from huggingface_hub import HfApi

        with _told(f"hf://{repo}"):
            api = HfApi()
            api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, repo_type=kind, folder_path=home, commit_message=f"Upload {source.name}")
    return f"{SCHEME}{repo}" if kind == "model" else f"{SCHEME}datasets/{repo}/{source.name}"


def _stage_student(source: Path, home: Path, licence: str | None) -> str:
    from pipeline.student import CARD, Student

    student = Student.load(source)
    if student.tokenization is None:
        raise InputError(f"{source}: a student that answers for its own concepts only; publish one that a sweep leaves")
    if not student.card.strip():
        raise InputError(f"{source}: has no card ({CARD}); train it again, or write one")
    for name in FILES:
        shutil.copy(source / name, home / name)
    stated = student.config.get("teacher_licence", UNSTATED)
    _must_be_stated(source, licence or stated)
    if licence:
        card = student.card.replace(f"license: {stated}", f"license: {licence}", 1)
        (home / CARD).write_text(card.replace(f"`{stated}`", f"`{licence}`"), encoding="utf-8")
    return "model"


def _stage_vectors(source: Path, home: Path, licence: str | None) -> str:
    import json

    from pipeline.teachers import licence_of
    from pipeline.vectors import read_header

    if not source.is_file():
        raise InputError(f"{source}: neither a student folder nor a vectors file")
    header = read_header(source)
    licence = licence or licence_of(header["teacher"])
    _must_be_stated(source, licence)
    shutil.copy(source, home / source.name)
    card = vectors_card(header, licence, len(json.loads(header["concepts"])))
    (home / "README.md").write_text(card, encoding="utf-8")
    return "dataset"


def _must_be_stated(source: Path, licence: str) -> None:
    if licence == UNSTATED:
        raise InputError(
            f"{source}: the licence of its teacher is not known; state it with --licence, such as apache-2.0"
        )


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turn the hub's errors into ours: one line that says what to do."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{place}: not found, or not yours to see; check the name, and log in with: hf auth login"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{place}: {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(f"{place}: the hub refuses ({status}); log in with: hf auth login") from error
        raise WorkError(f"{place}: the hub answers {status}: {str(error).splitlines()[0]}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise WorkError(f"{place}: the hub does not answer ({str(error).splitlines()[0][:160]})") from error
