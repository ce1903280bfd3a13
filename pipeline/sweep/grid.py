"""Grids: an experiment as a YAML file that spans cells.

``axes`` maps options of `Cell` to lists of values and ``fixed`` maps others to one value; the cells are every
combination. ``exclude`` lists settings: a cell that has all of one is left out. ``include`` lists settings of further
cells, on top of ``fixed``. ``seeds`` trains each cell so many times, with seeds counted up from its own. An axis that a
student does not read (ridge has no hidden layers and no seed) does not multiply its cells. ``vectors`` names the
vectors file that the grid is made for.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from pipeline.data import lists
from pipeline.errors import InputError, choices
from pipeline.settings import SHIPPED, Cell, check
from pipeline.storage import fetch, file_name
from pipeline.training.kinds import KINDS

KEYS = ("vectors", "axes", "fixed", "include", "exclude", "seeds")
OPTIONS = tuple(item.name for item in fields(Cell))

NAMED = re.compile(
    r"(?:unknown )?([\w-]+) "
)  # the option that an error is about: "--epochs 0: ...", "unknown student ..."

Place = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, too, as in JSON and in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_grid(name_or_path: str, epochs: int | None = None, seeds: int | None = None) -> tuple[str, list[Cell]]:
    """Read a grid and span its cells.

    Args:
        name_or_path: a grid of ``pipeline/grids`` by name, or the path of a YAML file.
        epochs: replaces the grid's epochs in every cell.
        seeds: how many seeds each cell is trained with, counted up from its own; replaces the grid's.

    Returns:
        The grid's name and its cells, in the order of the axes, then those included.

    Raises:
        InputError: no such grid, or one that is not valid; the message names the file, the line and the key.
    """
    grid = _read(_find(name_or_path))
    _check_sections(grid)
    cells = _span(grid)
    if epochs is not None:
        cells = [replace(cell, epochs=epochs) for cell in cells]
    number = grid.content.get("seeds", 1) if seeds is None else seeds
    seeded = [canonical(replace(cell, seed=cell.seed + offset)) for offset in range(number) for cell in cells]
    return file_name(grid.path.stem), list(dict.fromkeys(seeded))


def locate_error(error: InputError, cell: Cell, name_or_path: str) -> InputError:
    """The error of a cell that was read from a grid, with the file and the line of the value that is wrong.

    Args:
        error: its message begins with the option, as `check` and `choices` write it.
        cell: the cell.
        name_or_path: the grid.
    """
    return _read(_find(name_or_path)).wrong_value(error, cell)


def vectors_of(name_or_path: str) -> str:
    """The vectors file that a grid is made for: its ``vectors``, or the shipped one."""
    return str(_read(_find(name_or_path)).content.get("vectors", SHIPPED))


@dataclass(frozen=True)
class _Grid:
    """A grid file: its content, and the line of every key and list item by its place."""

    path: Path
    content: Any
    lines: dict[Place, int]

    def section(self, name: str) -> Any:
        """What stands under a key; an empty collection where there is nothing."""
        return self.content.get(name) or ([] if name in ("include", "exclude") else {})

    def wrong(self, message: str, *place: str | int) -> InputError:
        """The error for something at a place, or at the nearest place around it that has a line."""
        line = next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)
        return InputError(f"grid {self.path}{f', line {line}' if line else ''}: {message}")

    def wrong_value(self, error: InputError, cell: Cell) -> InputError:
        """The error of a cell, where the grid has the value that it is about."""
        found = NAMED.match(str(error))
        option = found[1].removeprefix("--").replace("-", "_") if found else ""
        value = getattr(cell, option, None)
        places: list[Place] = [
            *(("include", number, option) for number in range(len(self.section("include")))),
            *(("axes", option, number) for number in range(len(self.section("axes").get(option, ())))),
            ("fixed", option),
        ]
        message = str(error).replace(f"--{option.replace('_', '-')} ", f"{option} ", 1)
        return self.wrong(message, *next((place for place in places if self._holds(value, place)), ()))

    def _holds(self, value: Any, place: Place) -> bool:
        """Whether that value stands at a place."""
        found = self.content
        for step in place:
            if isinstance(found, dict) and step not in found:
                return False
            found = found[step]
        return found == value and isinstance(found, bool) == isinstance(value, bool)  # 1 is no true

    def check_keys(self, known: tuple[str, ...], *place: str | int) -> None:
        """Check the keys of the mapping at a place."""
        found = self.content
        for step in place:
            found = found[step]
        for key in found:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(known)}"
                raise self.wrong(f"unknown key {key!r}; {hint}", *place, str(key))


def _check_sections(grid: _Grid) -> None:
    if not isinstance(grid.content, dict) or not grid.content:
        raise grid.wrong(f"expected the keys {', '.join(KEYS)}")
    grid.check_keys(KEYS)
    for section in ("fixed", "axes"):
        if not isinstance(grid.section(section), dict):
            raise grid.wrong(f"{section}: expected options of a student, found {grid.section(section)!r}", section)
        if grid.section(section):
            grid.check_keys(OPTIONS, section)
    _check_axes(grid)
    _check_lists(grid)
    seeds = grid.content.get("seeds", 1)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise grid.wrong(f"seeds: expected a whole number of at least 1, found {seeds!r}", "seeds")


def _check_axes(grid: _Grid) -> None:
    for axis, values in grid.section("axes").items():
        if not isinstance(values, list) or not values:
            raise grid.wrong(f"axis {axis}: expected a list of at least one value, found {values!r}", "axes", axis)
        if len(set(map(repr, values))) != len(values):
            raise grid.wrong(f"axis {axis}: a value stands twice in {values}", "axes", axis)
        if axis in grid.section("fixed"):
            raise grid.wrong(f"{axis} is both fixed and an axis", "axes", axis)


def _check_lists(grid: _Grid) -> None:
    for section in ("include", "exclude"):
        listed = grid.section(section)
        if not isinstance(listed, list) or not all(isinstance(item, dict) and item for item in listed):
            raise grid.wrong(f"{section}: expected a list of settings, found {listed!r}", section)
        for number in range(len(listed)):
            grid.check_keys(OPTIONS, section, number)


def _span(grid: _Grid) -> list[Cell]:
    """The cells, before epochs and seeds of the command line."""
    cells, used = [], set()
    excluded = grid.section("exclude")
    for values, place in _settings(grid.section("axes"), grid.section("fixed"), grid.section("include")):
        cell = _cell(grid, values)
        matches = [n for n, item in enumerate(excluded) if all(getattr(cell, key) == item[key] for key in item)]
        used.update(matches)
        if place or not matches:
            cells.append(cell)
    for number, item in enumerate(excluded):
        if number not in used:
            raise grid.wrong(f"exclude: {item} matches no cell", "exclude", number)
    if not cells:
        raise grid.wrong("no cells are left", "exclude")
    return cells


def _cell(grid: _Grid, values: dict[str, Any]) -> Cell:
    cell = Cell(**values)
    try:
        check(cell)
    except InputError as error:
        raise grid.wrong_value(error, cell) from None
    return cell


def _settings(
    axes: dict[str, list[Any]], fixed: dict[str, Any], include: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], Place]]:
    """The settings of each cell, and the place in the file of those that are included."""
    for point in itertools.product(*axes.values()):
        yield {**fixed, **dict(zip(axes, point, strict=True))}, ()
    for number, item in enumerate(include):
        yield {**fixed, **item}, ("include", number)


def canonical(cell: Cell) -> Cell:
    """The cell with all that its student does not read at the defaults, so that equal work is one cell."""
    return KINDS[cell.student].canonical(cell) if cell.student in KINDS else cell


def _read(path: Path) -> _Grid:
    text = lists.whole(path, f"grid {path}")
    try:
        root = yaml.compose(text, Loader=_Loader)
        return _Grid(path, _Loader(text).get_single_data(), dict(_lines(root, (), path)) if root is not None else {})
    except yaml.YAMLError as error:
        raise InputError(f"grid {path}: {' '.join(str(error).split())}") from error


def _lines(node: yaml.Node, place: Place, path: Path) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if (before := seen.setdefault(key.value, line)) != line:
                raise InputError(f"grid {path}, line {line}: {key.value!r} stands already at line {before}")
            yield (*place, key.value), line
            yield from _lines(value, (*place, key.value), path)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*place, number), item.start_mark.line + 1
            yield from _lines(item, (*place, number), path)


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return fetch(name_or_path)
    shipped = {Path(str(item)).stem: Path(str(item)) for item in files("pipeline").joinpath("grids").iterdir()}
    if name_or_path not in shipped:
        raise InputError(f"{choices('grid', name_or_path, shipped)}; or the path of a YAML file")
    return shipped[name_or_path]
