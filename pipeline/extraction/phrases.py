"""A teacher's vectors of other phrases than those of a vectors file, read in the same way and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.vectors import EXTRACTION_VERSION, Vectors, read_vectors
from pipeline.devices import TeacherAccess
from pipeline.errors import InputError
from pipeline.extraction.vocabulary import Bar, find_teacher_of
from pipeline.storage import Output

log = logging.getLogger(__name__)


def extract_phrases(
    like: Vectors,
    phrases: Sequence[str],
    layers: Sequence[int],
    folder: Path,
    access: TeacherAccess,
    bar: Bar,
) -> Vectors:
    """Read the vectors and the tokens of phrases from the teacher of a vectors file, in its first template.

    Args:
        like: the vectors file, which decides teacher, precision, template and position.
        phrases: each once.
        layers: blocks.
        folder: where the answer is kept, and found again without the teacher.
        access: where the teacher runs.
        bar: shows the progress in phrases.

    Returns:
        The vectors, a row per phrase.

    Raises:
        InputError: the teacher is not to be had, or is another than that of the file.
        WorkError: out of memory.
    """
    about = [like.revision, like.tokenizer, like.templates[0], like.pool, like.dtype, like.token_block, list(layers)]
    key = hashlib.sha256(json.dumps([EXTRACTION_VERSION, *about, list(phrases)]).encode()).hexdigest()[:16]
    path = folder / "phrases" / f"{key}.safetensors"
    if path.is_file():
        try:
            return read_vectors(path)
        except InputError as error:
            log.warning("warning: %s is read again (%s)", path, error)
            path.unlink()
    # Only here, because transformers takes seconds to load.
    from pipeline.extraction.parts import PartPlan, merge, read_parts
    from pipeline.extraction.reader import automatic_batch_tokens
    from pipeline.extraction.request import Request
    from pipeline.teachers.load import load_teacher

    source = find_teacher_of(like, access)
    request = Request(
        concepts=tuple(phrases), categories=("",) * len(phrases), splits=("test",) * len(phrases), layers=tuple(layers),
        templates=like.templates[:1], teacher=like.teacher, revision=like.revision, pool=like.pool, dtype=like.dtype,
        depth=like.depth, token_block=like.token_block, language=like.language, tokenizer=source.tokenizer,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(source, access.device, access.device_map)
    plan = PartPlan.open(
        Output.at(str(path)), request, like.d_model, 1, automatic_batch_tokens(source.config, access.device)
    )
    missing = plan.missing()
    with bar(sum(part.stop - part.start for part in missing)) as advance:
        read_parts(teacher, request, plan, missing, progress=advance)
    merge(request, plan)
    return read_vectors(path)
