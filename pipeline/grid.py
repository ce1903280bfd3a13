"""Grids: an experiment as a YAML file that spans cells.

``axes`` maps options of `Cell` to lists of values, ``fixed`` maps others to one value; the cells are every combination.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InputError, choices
from pipeline.options import Cell, check

KEYS = ("axes", "fixed")
OPTIONS = tuple(item.name for item in fields(Cell))


def read_grid(name_or_path: str, epochs: int | None = None, seeds: int = 1) -> tuple[str, list[Cell]]:
    """Read a grid and span its cells.

    Args:
        name_or_path: a grid of ``pipeline/grids`` by name, or the path of a YAML file.
        epochs: replaces the grid's epochs in every cell.
        seeds: how many seeds each cell is trained with, counted up from its own.

    Returns:
        The grid's name and its cells, in the order of the axes.

    Raises:
        InputError: no such grid, or one that is not valid; the message names the file and the key.
    """
    path = _find(name_or_path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"grid {path}: {' '.join(str(error).split())}") from error
    where = f"grid {path}"
    if not isinstance(content, dict) or not content:
        raise InputError(f"{where}: expected the keys {' and '.join(KEYS)}")
    _known(content, KEYS, where)
    fixed, axes = (content.get(key) or {} for key in ("fixed", "axes"))
    for key, section in (("fixed", fixed), ("axes", axes)):
        if not isinstance(section, dict):
            raise InputError(f"{where}, {key}: expected options of a student, found {section!r}")
        _known(section, OPTIONS, f"{where}, {key}")
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}, axes, {axis}: expected a list of at least one value, found {values!r}")
        if len(set(map(repr, values))) != len(values):
            raise InputError(f"{where}, axes, {axis}: a value stands twice in {values}")
        if axis in fixed:
            raise InputError(f"{where}: {axis} is both fixed and an axis")
    cells = [
        _cell({**fixed, **dict(zip(axes, point, strict=True))}, where) for point in itertools.product(*axes.values())
    ]
    if epochs is not None:
        cells = [replace(cell, epochs=epochs) for cell in cells]
    return path.stem, [replace(cell, seed=cell.seed + offset) for offset in range(seeds) for cell in cells]


def _cell(values: dict[str, Any], where: str) -> Cell:
    cell = Cell(**values)
    try:
        check(cell)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('--').replace('-', '_', 1)}") from None
    return cell


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    shipped = {Path(str(item)).stem: Path(str(item)) for item in files("pipeline").joinpath("grids").iterdir()}
    if name_or_path not in shipped:
        raise InputError(f"{choices('grid', name_or_path, shipped)}; or the path of a YAML file")
    return shipped[name_or_path]


def _known(found: Iterable[Any], known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
