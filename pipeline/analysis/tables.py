"""The numbers of one section of a sweep as text: tables, and a verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.analysis.rows import (
    BASELINE_FIELDS,
    Row,
    baseline_key,
    by_configuration,
    cell_of,
    configuration,
    grouped,
    is_relevant,
    varying_fields,
)
from pipeline.metrics import interval, intervals

Table = tuple[list[str], list[list[str]]]  # header and rows, as text
TABLE_NOTE = "Students in parentheses are the baselines. Intervals: bootstrap over test concepts and seeds."
TEST_METRICS = ("test_cosine", "test_cosine_raw", "test_r2", "test_retrieval_at_1", "test_retrieval_at_5")
METRICS = ("parameters", "val_cosine", *TEST_METRICS, "train_seconds")
FORMATS = {"parameters": "{:,}", "train_seconds": "{:.1f}"}  # of the others: {:.3f}
TERMINAL_METRICS = ("parameters", "val_cosine", "test_cosine", "test_r2")
WIDTH = 100  # characters of a line in a terminal
GAP = 2  # characters between two columns
SHORT_TITLES = {"hidden_dim": "hidden", "parameters": "params", "learning_rate": "lr"}


def all_metrics(results: dict[str, Any]) -> tuple[str, ...]:
    """`METRICS`, and the scores on benchmarks and the shares retained that the cells have."""
    found = {name: None for row in results["cells"] for name in row if name.endswith(("_score", "_retained"))}
    return (*METRICS, *found)


def cell_table(results: dict[str, Any], metrics: Sequence[str] = METRICS, named: bool = False) -> Table:
    """Cells and baselines by concepts and test cosine; a column per differing option, or one for all if ``named``."""
    rows = sorted(results["cells"] + results["baselines"], key=lambda row: (row["concepts"], row["test_cosine"]))
    options = _options(rows)
    head = ["cell"] if named else ["student", *options]
    table = []
    for row in rows:
        names = [_name(row)] if named else [_student(row), *(_option(row, name) for name in options)]
        numbers = [FORMATS.get(name, "{:.3f}").format(row[name]) if name in row else "" for name in metrics]
        table.append(names + numbers)
    return [*head, *metrics], table


def leading_cells(results: dict[str, Any], most: int) -> dict[str, Any]:
    """The results with the best cells by validation only, where there are more, and the best cell's baselines."""
    ranked = sorted(results["cells"], key=lambda row: -row["val_cosine"])
    if len(ranked) <= most:
        return results
    baselines = [row for row in results["baselines"] if row["concepts"] == ranked[0]["concepts"]]
    return results | {"cells": ranked[:most], "baselines": baselines}


def terminal_table(results: dict[str, Any]) -> Table:
    """`cell_table` as it fits a terminal: with fewer numbers, and names of cells where too many options differ."""
    for metrics in (TERMINAL_METRICS, TERMINAL_METRICS[:-1]):
        head, rows = cell_table(results, metrics)
        words = [max(map(len, title(name).split("\n"))) for name in head]
        widths = [max(column) for column in zip(words, *([len(text) for text in row] for row in rows), strict=True)]
        if sum(widths) + GAP * (len(widths) - 1) <= WIDTH:
            return head, rows
    return cell_table(results, TERMINAL_METRICS, named=True)


def title(column: str) -> str:
    """A column's title in a terminal, one word per line."""
    return SHORT_TITLES.get(column, column).replace("_", "\n")


def _name(row: Row) -> str:
    """A cell's name, or a baseline's kind and fields."""
    own = [f"{row[name]} concepts" if name == "concepts" else str(row[name]) for name in BASELINE_FIELDS if name in row]
    return str(row.get("name") or ", ".join([_student(row), *own]))


def _options(rows: Sequence[Row]) -> list[str]:
    """The options in which rows differ, the seed last; the student always has a column."""
    found = [name for name in varying_fields(rows) if name != "student"]
    return sorted(found, key=lambda name: name == "seed")


def _student(row: Row) -> str:
    return row["student"] if "name" in row else f"({row['student']})"


def _option(row: Row, option: str) -> str:
    """An option's value as text; empty where it does not matter for the row."""
    if not is_relevant(row, option) or row[option] is None:
        return ""
    value = row[option]
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def verdict(results: dict[str, Any]) -> str:
    """A comparison of the best cell by validation with its baselines, and with ridge at every number of concepts."""
    best = results["best"]
    baselines = {(row["student"], *map(row.get, BASELINE_FIELDS)): row for row in results["baselines"]}
    ridge, nearest = (baselines[kind, *baseline_key(best)] for kind in ("ridge", "nearest"))
    own = by_configuration(results["cells"])[configuration(cell_of(best))]
    seeds, mean = [row["test_cosine"] for row in own], mean_of(own, "test_cosine")
    averaged = f"mean of {len(seeds)} seeds, {min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "one seed"
    # Differences on the same concepts: concepts that are hard for both do not widen the interval.
    low, high = (round(end, 3) for end in interval(test_cosines(own) - np.array(ridge["test_cosines"])))
    relation = "beats" if low > 0 else "does not beat" if high < 0 else "cannot be told apart from"
    lines = [
        f"Best cell by validation: {best['name']}, test cosine {mean:.3f} ({averaged}). It {relation} ridge regression "
        f"on the same {best['concepts']} concepts ({ridge['test_cosine']:.3f}; difference "
        f"{mean - ridge['test_cosine']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}); nearest training concept "
        f"{nearest['test_cosine']:.3f}, constant mean 0 by definition."
    ]
    margins = []
    for concepts, cells in sorted(grouped(results["cells"], lambda row: row["concepts"]).items()):
        cell = max(cells, key=lambda row: row["val_cosine"])
        margin = cell["test_cosine"] - baselines["ridge", *baseline_key(cell)]["test_cosine"]
        margins.append(f"{margin:+.3f} at {concepts}")
    if len(margins) > 1:
        lines.append(f"Against ridge, the best by validation at each number of concepts: {', '.join(margins)}.")
    return " ".join(lines)


def test_cosines(rows: Sequence[Row]) -> NDArray[np.float64]:
    """The cosine of each test concept, one row per seed, ``[seeds, N]``."""
    return np.array([row["test_cosines"] for row in rows], np.float64)


def configurations(results: dict[str, Any]) -> list[list[Row]]:
    """The rows of each configuration, one per seed, and each baseline alone; the best on test first."""
    groups = [*by_configuration(results["cells"]).values(), *([row] for row in results["baselines"])]
    return sorted(groups, key=lambda group: -mean_of(group, "test_cosine"))


def configuration_table(results: dict[str, Any]) -> Table:
    """Each configuration's means over seeds, with a bootstrap interval over test concepts and seeds."""
    groups = configurations(results)
    options = [name for name in _options([row for group in groups for row in group]) if name != "seed"]
    rows = []
    for own, (low, high) in zip(groups, intervals(list(map(test_cosines, groups))), strict=True):
        size = f"{own[0]['parameters']:,}" if "parameters" in own[0] else ""
        seeds = str(len(own)) if "name" in own[0] else ""
        values = [f"{mean_of(own, key):.3f}" for key in ("val_cosine", "test_cosine")]
        names = [_student(own[0]), *(_option(own[0], name) for name in options)]
        rows.append([*names, size, seeds, *values, f"{low:.3f} to {high:.3f}"])
    return ["student", *options, "parameters", "seeds", "val cosine", "test cosine", "95 % interval"], rows


def mean_of(rows: Sequence[Row], key: str) -> float:
    """The mean of a column, over seeds."""
    return float(np.mean([row[key] for row in rows]))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])
