"""The predict command: stream texts through a student to vectors, in memory that does not grow with their number."""

from __future__ import annotations

import csv
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.commands import display
from pipeline.data import lists
from pipeline.errors import InputError, WorkError, choices
from pipeline.settings import PredictOptions
from pipeline.storage import Output, fetch, write_atomically, write_to_stdout
from pipeline.student.lookup import FloatArray
from pipeline.student.nearest import Candidates
from pipeline.student.student import Student
from pipeline.student.tokenizer import normalise_texts

CHUNK = 1 << 15  # texts held at once
VECTORS_FILE = ".safetensors"
DECIMALS = 5  # of a vector's numbers in text


class Chunk(NamedTuple):
    """Some texts with what was computed for them; cosines are centred."""

    texts: list[str]
    vectors: FloatArray  # [texts, d_model], not centred
    nearest: list[list[tuple[str, float]]] | None  # concepts with their cosines; None without ``--nearest``
    cosines: FloatArray | None  # with the true vectors, [texts]; None without ``--compare``


def run_predict(options: PredictOptions, texts: Sequence[str]) -> None:
    """Predict vectors of texts and write or print them; nearest concepts and cosines as a table, if not in the file."""
    if bool(texts) == (options.file is not None):
        raise InputError("predict: expected texts as arguments, or --file FILE (- for standard input)")
    output = None if options.output is None else Output.at(options.output)
    kind = "" if output is None else output.path.suffix.lower()
    if kind not in WRITERS:
        raise choices("kind of --output", kind, [name for name in WRITERS if name])
    student = _student_at(options.run or _newest_student())
    candidates = _candidates(student, options)
    compare = _comparison(student, options) if options.compare else None
    shown: list[list[str]] = []
    holds = kind in (".csv", ".jsonl") or not (options.nearest or options.compare)

    def chunks(source: Iterable[list[str]], advance: Callable[[float], None]) -> Iterator[Chunk]:
        for some in source:
            vectors = student.encode(some)
            nearest = student.nearest(vectors, options.nearest, candidates) if options.nearest else None
            chunk = Chunk(some, vectors, nearest, compare(some, vectors) if compare is not None else None)
            if not holds:
                shown.extend(_rows(chunk))
            yield chunk
            advance(len(some))

    with _texts(options, texts, counted=kind in (".npy", ".safetensors")) as (source, total):
        if output is None:
            for chunk in chunks(source, lambda _number: None):
                if holds:
                    write_to_stdout(_json_lines(chunk, sys.stdout.encoding))
        else:
            with display.counting("predict", "texts")(total) as advance:
                made = chunks(source, advance)
                write_atomically(output.path, lambda part: WRITERS[kind](part, made, total, student))
            output.publish()
            output.remove_local_copy()
    if shown:
        nearest = "nearest concepts (cosine)" if options.among is None else "nearest (cosine)"
        asked = {nearest: options.nearest, "cosine with the true vector": options.compare}
        display.table(["text", *(title for title, is_asked in asked.items() if is_asked)], shown)


def _student_at(place: str) -> Student:
    if not place.startswith(("runs:", "models:")):
        return Student.load(place)
    from pipeline.tracking import load_student  # here, since MLflow takes seconds to load

    return load_student(place)


def _newest_student() -> str:
    found = sorted(Path("results").glob("*_student"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("no student in results/; train one with sweep or train, or name one with --run")
    sweep = re.match(r".*_results_[0-9TZ]+", found[-1].name)
    same = [str(path) for path in found if sweep and path.name.startswith(sweep[0])]
    if len(same) > 1:
        names = ", ".join(same)
        raise InputError(f"--run: the newest sweep left a student for each block or split; name one of {names}")
    return str(found[-1])


def _candidates(student: Student, options: PredictOptions) -> Candidates | None:
    """What ``--nearest`` searches: the student's catalogue, a vectors file, or a list of phrases."""
    if options.among is None:
        return student.candidates() if options.nearest else None
    if options.nearest is None:
        raise InputError("--among: expected --nearest too, how many to name")
    name, path = f"--among {options.among}", _fetch(options.among)
    try:
        if path.suffix.lower() == VECTORS_FILE:
            return student.candidates(path)
    except InputError as error:
        raise InputError(f"--among: {error}") from error
    with lists.opened(path, name) as file:
        phrases = [text for some in _read(file, name, options.among, options.column) for text in some]
    if not phrases:
        raise InputError(f"{name}: no phrases")
    return student.candidates(phrases)


def _fetch(place: str) -> Path:
    if "://" not in place and not place.startswith(("runs:", "models:")):
        return Path(place)
    from pipeline.tracking import fetch as fetch_from_anywhere

    return fetch_from_anywhere(place)


def _comparison(student: Student, options: PredictOptions) -> Callable[[list[str], FloatArray], FloatArray]:
    """Load the teacher; the function returned computes centred cosines with its own vectors."""
    import torch  # here, like what follows: predictions alone need neither torch nor the teacher

    from pipeline.extraction.reader import read_texts
    from pipeline.metrics import cosines
    from pipeline.processes import start
    from pipeline.teachers.find import find_teacher, warn_if_different
    from pipeline.teachers.load import load_teacher

    device = start().device
    name, dtype = options.teacher or student.config["teacher"], options.dtype or student.config["dtype"]
    source = find_teacher(name, dtype, device, options.trust_remote_code)
    warn_if_different(source, student.config["revision"], student.config.get("tokenizer", ""))
    teacher = load_teacher(source, device, options.device_map)

    def compare(texts: list[str], vectors: FloatArray) -> FloatArray:
        place = student.config
        true = read_texts(teacher, texts, place["template"], place["layer"], place["pool"]) - student.mean
        cosine: FloatArray = cosines(*map(torch.from_numpy, (vectors - student.mean, true))).numpy()
        return cosine

    return compare


@contextmanager
def _texts(
    options: PredictOptions, texts: Sequence[str], counted: bool
) -> Iterator[tuple[Iterable[list[str]], int | None]]:
    """Yield the texts, checked, in chunks, and their number where it is known; ``counted``: where it must be."""
    if options.file is None:
        yield _checked_chunks(enumerate(texts, 1), "text"), len(texts)
        return
    name = f"--file {options.file}" if options.file != "-" else "standard input"
    path = fetch(options.file) if options.file != "-" else None
    with nullcontext(lists.standard_input()) if path is None else lists.opened(path, name) as file:
        if path is not None and path.is_file():
            yield from _read_twice(file, name, options.file, options.column)
        elif not counted:
            yield _read(file, name, options.file, options.column), None
        else:  # a pipe can be read once only
            with tempfile.TemporaryFile() as copy:
                try:
                    copy.writelines(iter(lambda: lists.read_block(file, name), b""))
                except OSError as error:
                    raise WorkError(f"cannot keep a copy of {name}: {error.strerror or error}") from error
                yield from _read_twice(copy, name, options.file, options.column)


def _read_twice(file: BinaryIO, name: str, place: str, column: str) -> Iterator[tuple[Iterable[list[str]], int | None]]:
    """Read once to count and to find every error in the texts, then again for the texts."""
    file.seek(0)
    total = sum(map(len, _read(file, name, place, column)))
    file.seek(0)
    yield _read(file, name, place, column), total


def _read(file: BinaryIO, name: str, place: str, column: str) -> Iterator[list[str]]:
    numbered = lists.texts(file, name)
    if lists.is_table(place):
        numbered = ((line, text) for line, (text,) in lists.table(file, name, [column]))
    return _checked_chunks(numbered, f"{name}, line")


def _checked_chunks(numbered: Iterable[tuple[int, str]], name: str) -> Iterator[list[str]]:
    """Check texts and yield them in chunks of `CHUNK`; errors name the number of the text."""
    rest = iter(numbered)
    while some := list(islice(rest, CHUNK)):
        yield normalise_texts((text for _, text in some), lambda place: f"{name} {some[place][0]}")


def _numbers(vectors: FloatArray) -> list[list[float]]:
    return vectors.astype(np.float64).round(DECIMALS).tolist()  # type: ignore[no-any-return]


def _json_lines(chunk: Chunk, encoding: str = "utf-8") -> Iterator[str]:
    """One line of JSON per text; characters beyond ASCII are escaped unless the encoding has them all."""
    escape = not encoding.lower().startswith("utf")
    for place, (text, vector) in enumerate(zip(chunk.texts, _numbers(chunk.vectors), strict=True)):
        line: dict[str, Any] = {"text": text}
        if chunk.nearest is not None:
            line["nearest"] = [[name, round(cosine, 4)] for name, cosine in chunk.nearest[place]]
        if chunk.cosines is not None:
            line["cosine"] = round(float(chunk.cosines[place]), 4)
        yield json.dumps(line | {"vector": vector}, ensure_ascii=escape) + "\n"


def _rows(chunk: Chunk) -> list[list[str]]:
    columns = [chunk.texts]
    if chunk.nearest is not None:
        columns.append([", ".join(f"{name} ({cosine:.2f})" for name, cosine in known) for known in chunk.nearest])
    if chunk.cosines is not None:
        columns.append([f"{cosine:.3f}" for cosine in chunk.cosines])
    return list(map(list, zip(*columns, strict=True)))


def _write_lines(path: Path, chunks: Iterable[Chunk], *_: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            file.writelines(_json_lines(chunk))


def _write_csv(path: Path, chunks: Iterable[Chunk], _total: int | None, student: Student) -> None:
    columns = [f"v{column}" for column in range(student.d_model)]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        for number, chunk in enumerate(chunks):
            if number == 0:
                asked = {"nearest": chunk.nearest, "cosine": chunk.cosines}
                table.writerow(["text", *(name for name, values in asked.items() if values is not None), *columns])
            pairs = zip(_rows(chunk), _numbers(chunk.vectors), strict=True)
            table.writerows([*row, *vector] for row, vector in pairs)
        if file.tell() == 0:  # there were no texts
            table.writerow(["text", *columns])


def _write_npy(path: Path, chunks: Iterable[Chunk], total: int | None, student: Student) -> None:
    assert total is not None
    array = np.lib.format.open_memmap(path, "w+", np.float32, (total, student.d_model))
    start = 0
    for chunk in chunks:
        array[start : start + len(chunk.texts)] = chunk.vectors
        start += len(chunk.texts)
    array.flush()


def _write_safetensors(path: Path, chunks: Iterable[Chunk], total: int | None, student: Student) -> None:
    """One tensor, ``vectors`` ``[texts, d_model]`` float32, in the order of the texts."""
    assert total is not None
    source = {name: str(student.config[name]) for name in ("teacher", "revision", "layer", "template")}
    summary = {"dtype": "F32", "shape": [total, student.d_model], "data_offsets": [0, 4 * total * student.d_model]}
    text = json.dumps({"__metadata__": source, "vectors": summary}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk.vectors, "<f4").data)


WRITERS: dict[str, Callable[[Path, Iterable[Chunk], int | None, Student], None]] = {
    "": _write_lines,
    ".jsonl": _write_lines,
    ".csv": _write_csv,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
}
