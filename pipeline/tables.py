"""The numbers of a sweep as text: tables, and a verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import interval
from pipeline.options import Cell
from pipeline.results import RIVAL, baseline_of
from pipeline.students import KINDS

Row = dict[str, Any]
NOTE = "Students in parentheses are the baselines. Intervals: bootstrap over test concepts and seeds."
FORMATS = {
    "student": "{}",
    "inputs": "{}",
    "concepts": "{}",
    "hidden_dim": "{}",
    "layers": "{}",
    "seed": "{}",
    "parameters": "{:,}",
    "val_cosine": "{:.3f}",
    "test_cosine": "{:.3f}",
    "test_cosine_raw": "{:.3f}",
    "test_r2": "{:.3f}",
    "test_retrieval_at_1": "{:.3f}",
    "test_retrieval_at_5": "{:.3f}",
    "train_seconds": "{:.1f}",
}
SHORT = ("student", "concepts", "hidden_dim", "layers", "parameters", "val_cosine", "test_cosine", "test_r2")


def table_rows(results: dict[str, Any], columns: Sequence[str] = tuple(FORMATS)) -> tuple[list[str], list[list[str]]]:
    """The table as text: its head, then the baselines (in parentheses) and the cells by concepts and test cosine."""
    floor = [row | {"student": f"({row['student']})"} for row in results["baselines"]]
    rows = sorted(results["cells"] + floor, key=lambda row: (row["concepts"], row["test_cosine"]))
    return list(columns), [
        [FORMATS[name].format(row[name]) if _applies(row, name) else "" for name in columns] for row in rows
    ]


def _applies(row: Row, column: str) -> bool:
    kind = KINDS.get(row["student"])
    return column in row and not (kind and column in Cell.__dataclass_fields__ and column not in kind.reads)


def verdict(results: dict[str, Any]) -> str:
    """How the best cell (chosen on validation) stands to the baselines, and to ridge at every number of concepts."""
    best = results["best"]
    floor = {(row["student"], *(row[name] for name in RIVAL)): row for row in results["baselines"]}
    same = rival_key(best)
    ridge, nearest = floor["ridge", *same], floor["nearest", *same]
    configuration = [name for name in Cell.__dataclass_fields__ if name != "seed"]
    own = [row for row in results["cells"] if all(row[name] == best[name] for name in configuration)]
    seeds = [row["test_cosine"] for row in own]
    mean = float(np.mean(seeds))
    known = f"mean of {len(seeds)} seeds, {min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "one seed"
    # Of the same concepts, so that what is hard for both does not blur the difference.
    low, high = (round(end, 3) for end in interval(test_cosines(own) - np.array(ridge["test_cosines"])))
    told = "beats" if low > 0 else "does not beat" if high < 0 else "cannot be told apart from"
    lines = [
        f"Best by validation: {best['name']}, test cosine {mean:.3f} ({known}). It {told} ridge regression on the same "
        f"{best['concepts']} concepts ({ridge['test_cosine']:.3f}; difference {mean - ridge['test_cosine']:+.3f}, 95 % "
        f"interval {low:+.3f} to {high:+.3f}); nearest training concept {nearest['test_cosine']:.3f}, constant mean 0 "
        "by definition."
    ]
    margins = []
    for concepts in sorted({row["concepts"] for row in results["cells"]}):
        rival = max((c for c in results["cells"] if c["concepts"] == concepts), key=lambda c: c["val_cosine"])
        margins.append(f"{rival['test_cosine'] - floor['ridge', *rival_key(rival)]['test_cosine']:+.3f} at {concepts}")
    if len(margins) > 1:
        lines.append(f"Against ridge, the best by validation at each number of concepts: {', '.join(margins)}.")
    return " ".join(lines)


def rival_key(row: Row) -> tuple[Any, ...]:
    """What names a row's baselines."""
    return tuple(getattr(baseline_of(row), name) for name in RIVAL)


def test_cosines(rows: Sequence[Row]) -> NDArray[np.float64]:
    """The cosine of each test concept, a row a seed, ``[seeds, N]``."""
    return np.array([row["test_cosines"] for row in rows], np.float64)


def configurations(results: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """The seeds of each configuration by its name, and the baselines in parentheses, the best on test first."""
    groups: dict[str, list[Row]] = {}
    for row in results["cells"]:
        groups.setdefault(row["name"].rpartition("-s")[0], []).append(row)
    for row in results["baselines"]:
        read = "" if row["student"] == "mean" else f", {row['inputs']}"  # the mean reads nothing
        groups[f"({row['student']}, {row['concepts']} concepts{read})"] = [row]
    return sorted(groups.items(), key=lambda group: -mean_of(group[1], "test_cosine"))


def summary(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Seeds of one configuration together: means, and a bootstrap interval over test concepts and seeds."""
    rows = []
    for name, own in configurations(results):
        low, high = interval(test_cosines(own))
        size, seeds = (f"{own[0]['parameters']:,}", str(len(own))) if name[0] != "(" else ("", "")
        values = [f"{mean_of(own, key):.3f}" for key in ("val_cosine", "test_cosine")]
        rows.append([name, size, seeds, *values, f"{low:.3f} to {high:.3f}"])
    return ["student", "parameters", "seeds", "val cosine", "test cosine", "95 % interval"], rows


def mean_of(rows: Sequence[Row], key: str) -> float:
    """The mean of a column, over seeds."""
    return float(np.mean([row[key] for row in rows]))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])
