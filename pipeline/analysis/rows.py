"""Which rows of a sweep belong together: seeds of one configuration, sections, baselines; and how they are labelled.

All of it follows from the fields of the cells, never from a name. A row is a cell's or a baseline's in a results file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.settings import Cell
from pipeline.training.kinds import KINDS

Row = dict[str, Any]
CELL_FIELDS = tuple(Cell.__dataclass_fields__)
SECTION_FIELDS = ("layer", "split")  # cells that differ in these have other true vectors or other test concepts
BASELINE_FIELDS = ("concepts", "layer", "inputs", "targets", "split")  # what a cell has in common with its baselines
BASELINE_NAMES = {"ridge": "ridge regression", "nearest": "the nearest training concept", "mean": "the constant mean"}


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a row."""
    return Cell(**{name: row[name] for name in CELL_FIELDS})


def configuration(cell: Cell) -> Cell:
    """What all seeds of a cell have in common: every field but the seed."""
    return replace(cell, seed=0)


def by_configuration(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    """The seeds of each configuration, in the order of the rows."""
    groups: dict[Cell, list[Row]] = {}
    for row in rows:
        groups.setdefault(configuration(cell_of(row)), []).append(row)
    return groups


def ridge_baseline(cell: Cell) -> Cell:
    """The ridge regression on the same concepts, block, inputs, targets and split: what the cell should beat.

    Of a truncated student the inputs without the teacher's blocks: ridge regression on these is that student itself.
    """
    read = cell.inputs if "inputs" in KINDS[cell.student].reads else Cell().inputs
    return Cell(student="ridge", **{name: getattr(cell, name) for name in BASELINE_FIELDS} | {"inputs": read})


def baseline_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What names the baselines of a cell's row: `BASELINE_FIELDS` as the baselines have it."""
    return tuple(getattr(ridge_baseline(cell_of(row)), name) for name in BASELINE_FIELDS)


def section_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row must have in common with others to be compared with them: `SECTION_FIELDS`."""
    return tuple(row[name] for name in SECTION_FIELDS)


def section_names(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], tuple[str, str]]:
    """The sections among rows, by `section_of`: what sets each apart from the others, in words and as ``_layer6``.

    Both are empty where there is one section only.
    """
    found = sorted({section_of(row) for row in rows})
    shown = [place for place in range(len(SECTION_FIELDS)) if len({key[place] for key in found}) > 1]
    named = {}
    for key in found:
        words = (f"block {key[0]}", f"held-out {key[1]}")
        short = (f"_layer{key[0]}", f"_{key[1]}")
        named[key] = ", ".join(words[place] for place in shown), "".join(short[place] for place in shown)
    return named


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields of a cell in which rows differ, in the order of the fields; a row need not have them all.

    Students of other kinds do not differ in what one of them does not read: there it stands at its default.
    """

    def differ(name: str) -> bool:
        own = [row for row in rows if name in row]
        told = {row[name] for row in own if applies(row, name)}
        return len(told) > 1 or len({(row["student"], row[name]) for row in own}) > len({row["student"] for row in own})

    return [name for name in CELL_FIELDS if differ(name)]


def applies(row: Mapping[str, Any], option: str) -> bool:
    """Whether an option says anything of a row: its student reads it, or it is not the default all the same."""
    if option not in row:
        return False
    kind = KINDS.get(row["student"])
    return kind is None or option in kind.reads or row[option] != Cell.__dataclass_fields__[option].default


def labeller(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What makes the labels of rows in a picture: the student, and every option in which the rows differ.

    Concepts and seeds are left out: pictures have axes, panels and bands for these.
    """
    shown = [name for name in varying(rows) if name not in ("student", "concepts", "seed")]

    def label(row: Row) -> str:
        sized = "hidden_dim" in KINDS[row["student"]].reads
        size = f" {row['hidden_dim']} wide, {row['layers']} deep" if sized else ""
        own = [name for name in shown if applies(row, name) and not (sized and name in ("hidden_dim", "layers"))]
        told = [text for name in own if (text := _told(name, row[name]))]
        return f"{row['student']}{size}" + (f" ({', '.join(told)})" if told else "")

    return label


def _told(option: str, value: object) -> str:
    """An option in words; nothing of one that is off."""
    name = option.replace("_", " ")
    return "" if value is None or value is False else name if value is True else f"{name} {value}"


def baseline_labeller(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What makes the labels of baselines: the kind, and everything but concepts in which the baselines differ."""
    shown = [name for name in varying(rows) if name not in ("student", "concepts")]

    def label(row: Row) -> str:
        told = [str(row[name]) if name == "inputs" else _told(name, row[name]) for name in shown if name in row]
        return ", ".join([row["student"], *told])

    return label
