"""Benchmarks as text: a table of scores with what is retained of the teacher's, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.analysis.rows import Row
from pipeline.analysis.tables import Table
from pipeline.benchmarks.catalogue import BENCHMARKS

NOTE = (
    "Scores on data of others, with the share of the teacher's score in parentheses; intervals are of 95 %, over the "
    "items. Vectors are centred on the mean training vector. The untrained table is that of single tokens which "
    "students read, and the input embeddings are the teacher's, both averaged over a phrase's tokens."
)


def names_in(rows: Sequence[Row]) -> list[str]:
    """The benchmarks that rows were measured on."""
    return [name for name in BENCHMARKS if any(f"{name}_score" in row for row in rows)]


def benchmark_table(rows: Sequence[Row], brief: bool = False) -> Table:
    """Each row's scores and shares; ``brief``: without intervals, as it fits a terminal."""
    names = names_in(rows)
    has_layers = len({row["layer"] for row in rows}) > 1

    def score(row: Row, name: str) -> str:
        text = f"{row[f'{name}_score']:.3f}"
        return text if brief else f"{text} ({row[f'{name}_score_low']:.3f} to {row[f'{name}_score_high']:.3f})"

    def share(row: Row, name: str) -> str:
        if row[f"{name}_retained"] is None:
            return ""
        text = f"{row[f'{name}_retained']:.0%}"
        low, high = row[f"{name}_retained_low"], row[f"{name}_retained_high"]
        return text if brief else f"{text} ({low:.0%} to {high:.0%})"

    head = ["student", *["block"] * has_layers]
    head += [title for name in names for title in (BENCHMARKS[name].title, "retained")]
    lines = []
    for row in rows:
        values = [text for name in names for text in (score(row, name), share(row, name))]
        lines.append([row["student"], *[str(row["layer"])] * has_layers, *values])
    return head, lines


def row_of(rows: Sequence[Row], name: str) -> Row:
    """The row of a student, or of the configuration that has a cell of this name as one of its seeds."""
    return next(row for row in rows if name == row["student"] or name in row.get("cells", ()))


def describe_best(rows: Sequence[Row], best: str) -> list[str]:
    """A sentence per benchmark: what a student retains, beside the table that it reads and the ridge regression."""
    own, sentences = row_of(rows, best), []
    for name in names_in([own]):
        if own[f"{name}_retained"] is None:
            continue
        low, high = own[f"{name}_retained_low"], own[f"{name}_retained_high"]
        others = [
            f"{row['student'].strip('()').partition(',')[0]} {row[f'{name}_retained']:.0%}"
            for row in rows
            if row["student"].startswith(("(untrained", "(input", "(ridge"))
            and row.get("concepts", own["concepts"]) == own["concepts"]
        ]
        sentences.append(
            f"{BENCHMARKS[name].title}: {own['student']} retains {own[f'{name}_retained']:.0%} of the teacher's score "
            f"({low:.0%} to {high:.0%}); {', '.join(others)}."
        )
    return sentences
