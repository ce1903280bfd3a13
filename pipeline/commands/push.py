"""The push command: students and vectors files onto the Hugging Face hub, each with its card."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from pipeline.data.vectors import read_header
from pipeline.errors import InputError
from pipeline.hub import FILES, SCHEME, translate_errors
from pipeline.settings import PushOptions
from pipeline.storage import base_name, write_to_stdout
from pipeline.student.folder import CARD
from pipeline.student.student import Student
from pipeline.teachers.families import UNSTATED, licence_of
from pipeline.training.card import vectors_card


def run_push(options: PushOptions, source: Path, repo: str) -> None:
    """Publish a student folder or a vectors file with its card as ``owner/name``, and print the address.

    Raises:
        InputError: neither a student nor a vectors file, no card, or a teacher whose licence is not stated.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise InputError(f"{repo}: expected owner/name")
    with tempfile.TemporaryDirectory() as home:
        kind = (_stage_student if source.is_dir() else _stage_vectors)(source, Path(home), options.licence)
        from huggingface_hub import HfApi

        with translate_errors(f"hf://{repo}"):
            api = HfApi()
            api.create_repo(repo, repo_type=kind, private=options.private, exist_ok=True)
            message = f"Upload {base_name(source)}"
            api.upload_folder(repo_id=repo, repo_type=kind, folder_path=home, commit_message=message)
    write_to_stdout([f"{SCHEME}{repo}\n" if kind == "model" else f"{SCHEME}datasets/{repo}/{source.name}\n"])


def _stage_student(source: Path, home: Path, licence: str | None) -> str:
    student = Student.load(source)
    if student.tokenization is None:
        raise InputError(f"{source}: a student that answers for its own concepts only; publish one that a sweep leaves")
    if not student.card.strip():
        raise InputError(f"{source}: has no card ({CARD}); train it again, or write one")
    for name in FILES:
        shutil.copy(source / name, home / name)
    stated = student.config.get("teacher_licence", UNSTATED)
    _require_licence(source, licence or stated)
    if licence:
        card = student.card.replace(f"license: {stated}", f"license: {licence}", 1)
        (home / CARD).write_text(card.replace(f"`{stated}`", f"`{licence}`"), encoding="utf-8")
    return "model"


def _stage_vectors(source: Path, home: Path, licence: str | None) -> str:
    if not source.is_file():
        raise InputError(f"{source}: neither a student folder nor a vectors file")
    header = read_header(source)
    licence = licence or licence_of(header["teacher"])
    _require_licence(source, licence)
    shutil.copy(source, home / source.name)
    card = vectors_card(header, licence, len(json.loads(header["concepts"])))
    (home / "README.md").write_text(card, encoding="utf-8")
    return "dataset"


def _require_licence(source: Path, licence: str) -> None:
    if licence == UNSTATED:
        hint = "state it with --licence, such as apache-2.0"
        raise InputError(f"{source}: the licence of its teacher is not known; {hint}")
