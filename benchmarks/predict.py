"""How fast a student turns text into vectors: the teacher, a peer, ours, and the floor. Run: make bench.

All read the same fresh phrases. The teacher is ours at its best, `read_texts` in bfloat16 and float32, on fewer of
them. The peer is model2vec's encode with a table of the same tokenizer, as wide as the student's vectors. The floor is
the time to copy the table rows that the phrases name and that of the matrix products, both measured in the same round.
Medians of several rounds.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from model2vec import StaticModel
from tokenizers import Tokenizer

from benchmarks.phrases import fresh_phrases
from pipeline import Student
from pipeline.extraction.reader import read_texts
from pipeline.student.student import BULK
from pipeline.teachers.find import find_teacher
from pipeline.teachers.load import load_teacher

FRESH = "import sys; from pipeline import Student; Student.load(sys.argv[1]).encode('slow cooking')"


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def ours(place: str, phrases: list[str]) -> float:
    """The time of a student that has its tables ready and has never met a word of the phrases."""
    student = Student.load(place)
    student.encode(["0"] * BULK)
    return seconds(lambda: student.encode(phrases))


def floor(student: Student, phrases: list[str]) -> float:
    """The least time for these phrases: rows copied, and matrix products."""
    assert student.tokenization is not None
    tokens = student.tokenization(phrases)
    tables = [torch.from_numpy(student.features.tables[part.table].values) for part in student.features.parts]
    rows = [torch.from_numpy(tokens.values if part.pool == "mean" else tokens.values[tokens.offsets[1:] - 1])
            for part in student.features.parts]  # fmt: skip
    copying = seconds(lambda: [table.index_select(0, own) for table, own in zip(tables, rows, strict=True)])
    maps = [torch.from_numpy(value) for value in student.parameters.values() if min(value.shape) > 1]
    inputs = [torch.randn(len(phrases), weight.shape[0]) for weight in maps]
    multiplying = seconds(lambda: [x @ weight for x, weight in zip(inputs, maps, strict=True)])
    return copying + multiplying


def main() -> None:
    """Measure in rounds, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student", help="a student folder (default: the newest in results/)")
    parser.add_argument("--phrases", type=int, default=100_000)
    parser.add_argument("--of-the-teacher", type=int, default=2_000, help="phrases that the teacher reads")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    place = str(options.student or max(Path("results").glob("*_student"), key=lambda path: path.stat().st_mtime))
    student = Student.load(place)
    phrases = fresh_phrases(options.phrases)
    load = [seconds(lambda: subprocess.run([sys.executable, "-c", FRESH, place], check=True)) for _ in range(3)]
    student.encode(phrases)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    told, few = student.config, phrases[: options.of_the_teacher]
    teachers = {dtype: load_teacher(find_teacher(told["teacher"], dtype)) for dtype in ("float32", "bfloat16")}
    table = np.random.default_rng(0).standard_normal((len(student.features.tables["0"].values), student.d_model))
    peer = StaticModel(table.astype(np.float32), Tokenizer.from_file(str(Path(place) / "tokenizer.json")))
    runs: dict[str, tuple[int, Callable[[], float]]] = {
        "floor": (len(phrases), lambda: floor(student, phrases)),
        "**ours**": (len(phrases), lambda: ours(place, phrases)),
        "model2vec": (len(phrases), lambda: seconds(lambda: peer.encode(phrases))),
        "model2vec, all cores": (len(phrases), lambda: seconds(lambda: peer.encode(phrases, use_multiprocessing=True))),
    }
    for dtype, teacher in teachers.items():
        runs[f"teacher, {dtype}"] = (
            len(few),
            lambda teacher=teacher: seconds(  # type: ignore[misc]
                lambda: read_texts(teacher, few, told["template"], told["layer"], told["pool"])
            ),
        )
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, (number, work) in runs.items():
            rates[name].append(number / work())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(rate for name, rate in medians.items() if name.startswith("teacher"))
    size = sum(path.stat().st_size for path in Path(place).iterdir()) / 1e6
    lines = [
        f"{told['cell']['student']}, {told['cell']['hidden_dim']} wide, {told['cell']['layers']} deep, {size:.1f} MB; "
        f"{len(phrases):,} phrases; {os.cpu_count()} cores; {memory:,.0f} MB of memory at most before the teacher; "
        f"a fresh interpreter answers in {statistics.median(load):.2f} s",
        "",
        "| what | texts/s | x teacher's best | x model2vec |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {rate:,.0f} | {rate / best:.0f} | {rate / medians['model2vec']:.2f} |"
          for name, rate in sorted(medians.items(), key=lambda entry: entry[1])),
    ]  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
