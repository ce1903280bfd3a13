"""Which rows of a results file belong together: seeds of one configuration, sections, baselines; and their labels.

All of it follows from the fields of the cells, never from a name. A row is that of a cell or of a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.settings import Cell
from pipeline.training.kinds import KINDS

Row = dict[str, Any]
Item = TypeVar("Item")
Key = TypeVar("Key")
CELL_FIELDS = tuple(Cell.__dataclass_fields__)
SECTION_FIELDS = ("layer", "split")  # cells that differ in these have other true vectors or other test concepts
BASELINE_FIELDS = ("concepts", "layer", "inputs", "targets", "split")  # what a cell has in common with its baselines
BASELINE_NAMES = {"ridge": "ridge regression", "nearest": "the nearest training concept", "mean": "the constant mean"}


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a row."""
    return Cell(**{name: row[name] for name in CELL_FIELDS})


def configuration(cell: Cell) -> Cell:
    """The cell with the default seed: one value for all seeds of a configuration."""
    return replace(cell, seed=0)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items with the same key, in their order."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_configuration(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    """The seeds of each configuration, in the order of the rows."""
    return grouped(rows, lambda row: configuration(cell_of(row)))


def ridge_baseline(cell: Cell) -> Cell:
    """The ridge regression on the same concepts, block, inputs, targets and split, which the cell should beat."""
    # Without the blocks that a truncated student reads: ridge regression on these is that student itself.
    read = cell.inputs if "inputs" in KINDS[cell.student].reads else Cell().inputs
    return Cell(student="ridge", **{name: getattr(cell, name) for name in BASELINE_FIELDS} | {"inputs": read})


def baseline_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of `BASELINE_FIELDS` of the baselines of a cell's row."""
    return tuple(getattr(ridge_baseline(cell_of(row)), name) for name in BASELINE_FIELDS)


def section_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The block and the split of a row: rows are compared only where these are the same."""
    return tuple(row[name] for name in SECTION_FIELDS)


def section_names(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], tuple[str, str]]:
    """The title (``block 6``) and the suffix (``_layer6``) of each section, by `section_of`; empty for a single one."""
    found = sorted({section_of(row) for row in rows})
    layers, splits = (len(set(values)) > 1 for values in zip(*found, strict=True)) if found else (False, False)
    return {
        (layer, split): (
            ", ".join(layers * [f"block {layer}"] + splits * [f"held-out {split}"]),
            layers * f"_layer{layer}" + splits * f"_{split}",
        )
        for layer, split in found
    }


def varying_fields(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields of a cell in which rows differ, in their order; what a student does not read does not count."""

    def differ(name: str) -> bool:
        own = [row for row in rows if name in row]
        values = {row[name] for row in own if is_relevant(row, name)}
        kinds = grouped(own, lambda row: row["student"]).values()
        return len(values) > 1 or any(len({row[name] for row in rows}) > 1 for rows in kinds)

    return [name for name in CELL_FIELDS if differ(name)]


def is_relevant(row: Mapping[str, Any], option: str) -> bool:
    """Whether an option matters for a row: its student reads it, or it has another value than the default."""
    if option not in row:
        return False
    kind = KINDS.get(row["student"])
    return kind is None or option in kind.reads or row[option] != Cell.__dataclass_fields__[option].default


def labeller(rows: Sequence[Row]) -> Callable[[Row], str]:
    """A function that labels rows in figures with the student and every option in which the rows differ."""
    # Figures have axes, panels and bands for concepts and seeds.
    shown = [name for name in varying_fields(rows) if name not in ("student", "concepts", "seed")]

    def label(row: Row) -> str:
        sized = "hidden_dim" in KINDS[row["student"]].reads
        size = f" {row['hidden_dim']} wide, {row['layers']} deep" if sized else ""
        own = [name for name in shown if is_relevant(row, name) and not (sized and name in ("hidden_dim", "layers"))]
        options = [text for name in own if (text := _option_in_words(name, row[name]))]
        return f"{row['student']}{size}" + (f" ({', '.join(options)})" if options else "")

    return label


def _option_in_words(option: str, value: object) -> str:
    """An option with its value; empty for one that is off."""
    name = option.replace("_", " ")
    return "" if value is None or value is False else name if value is True else f"{name} {value}"


def baseline_labeller(rows: Sequence[Row]) -> Callable[[Row], str]:
    """A function that labels baselines with their kind and all fields but concepts in which they differ."""
    shown = [name for name in varying_fields(rows) if name not in ("student", "concepts")]

    def label(row: Row) -> str:
        own = [name for name in shown if name in row]
        options = [str(row[name]) if name == "inputs" else _option_in_words(name, row[name]) for name in own]
        return ", ".join([row["student"], *options])

    return label
