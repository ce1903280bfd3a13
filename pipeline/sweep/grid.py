"""Grids: an experiment as a YAML file that spans cells.

``axes`` maps options of `Cell` to lists of values and ``fixed`` maps others to one value; the cells are every
combination. ``exclude`` lists settings: a cell that has all of one is left out. ``include`` lists settings of further
cells, on top of ``fixed``. An axis that a student does not read does not multiply its cells. ``concepts: all`` stands
for every training concept of the vectors file. ``benchmarks`` lists data of others on which the students are measured.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.data import lists
from pipeline.errors import InputError, choices
from pipeline.settings import ALL_CONCEPTS, SHIPPED, Cell, check
from pipeline.storage import fetch, file_name

KEYS = ("vectors", "axes", "fixed", "include", "exclude", "seeds", "benchmarks")
OPTIONS = tuple(item.name for item in fields(Cell))

# The option that begins an error's message: "--epochs 0: ...", "unknown student ...".
OPTION_OF_ERROR = re.compile(r"(?:unknown )?([\w-]+) ")

Position = tuple[str | int, ...]  # of a value in the file: keys and places in lists


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, too, as in JSON and in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class GridFile:
    """A grid as it was read: its content, and the line of every key and list item by its position."""

    path: Path
    content: Any
    lines: dict[Position, int]

    def get(self, key: str) -> Any:
        """The value of a key; an empty collection where the file lacks it."""
        return self.content.get(key) or ([] if key in ("include", "exclude") else {})

    def error(self, message: str, *position: str | int) -> InputError:
        """The error for a value at a position, with its line or that of the nearest value around it."""
        line = next((self.lines[position[:n]] for n in range(len(position), 0, -1) if position[:n] in self.lines), None)
        return InputError(f"grid {self.path}{f', line {line}' if line else ''}: {message}")

    def locate_error(self, error: InputError, cell: Cell) -> InputError:
        """The error of a cell, which begins with an option, with the file and the line of the option's value."""
        found = OPTION_OF_ERROR.match(str(error))
        option = found[1].removeprefix("--").replace("-", "_") if found else ""
        value = getattr(cell, option, None)
        positions = [position for position in self.lines if option in position and position[0] != "exclude"]
        message = str(error).replace(f"--{option.replace('_', '-')} ", f"{option} ", 1)
        # By their text, because 1 == True.
        return self.error(message, *next((each for each in positions if repr(self._at(each)) == repr(value)), ()))

    def _at(self, position: Position) -> Any:
        """The value at a position; MISSING where the file has none."""
        found = self.content
        for step in position:
            if isinstance(found, dict) and step not in found:
                return MISSING
            found = found[step]
        return found

    def check_keys(self, known: tuple[str, ...], *position: str | int) -> None:
        """Check the keys of the mapping at a position."""
        for key in self._at(position):
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(known)}"
                raise self.error(f"unknown key {key!r}; {hint}", *position, str(key))


@dataclass(frozen=True)
class Grid:
    """A grid: its cells in the order of the axes, then those included."""

    name: str
    cells: list[Cell]
    vectors: str  # the vectors file that it is made for, or the shipped one
    file: GridFile  # for errors that name the line of a wrong value
    benchmarks: tuple[str, ...] = ()  # on which its students are measured where they are at hand


def read_grid(name_or_path: str, epochs: int | None = None, seeds: int | None = None) -> Grid:
    """Read a grid, by name or from a YAML file, and span its cells, each once; epochs and seeds replace the grid's."""
    file = _read(_find(name_or_path))
    _check_content(file)
    cells = _span(file)
    if epochs is not None:
        cells = [replace(cell, epochs=epochs) for cell in cells]
    number = file.content.get("seeds", 1) if seeds is None else seeds
    seeded = [canonical(replace(cell, seed=cell.seed + offset)) for offset in range(number) for cell in cells]
    name = file_name(file.path.stem)
    benchmarks = tuple(file.content.get("benchmarks", ()))
    return Grid(name, list(dict.fromkeys(seeded)), str(file.content.get("vectors", SHIPPED)), file, benchmarks)


def _check_content(file: GridFile) -> None:
    if not isinstance(file.content, dict) or not file.content:
        raise file.error(f"expected the keys {', '.join(KEYS)}")
    file.check_keys(KEYS)
    for key in ("fixed", "axes"):
        if not isinstance(file.get(key), dict):
            raise file.error(f"{key}: expected options of a student, found {file.get(key)!r}", key)
        if file.get(key):
            file.check_keys(OPTIONS, key)
    _check_axes(file)
    _check_lists(file)
    benchmarks = file.content.get("benchmarks", [])
    if not isinstance(benchmarks, list) or not all(isinstance(name, str) for name in benchmarks):
        raise file.error(f"benchmarks: expected a list of names, found {benchmarks!r}", "benchmarks")
    seeds = file.content.get("seeds", 1)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise file.error(f"seeds: expected a whole number of at least 1, found {seeds!r}", "seeds")


def _check_axes(file: GridFile) -> None:
    for axis, values in file.get("axes").items():
        if not isinstance(values, list) or not values:
            raise file.error(f"axis {axis}: expected a list of at least one value, found {values!r}", "axes", axis)
        if len(set(map(repr, values))) != len(values):
            raise file.error(f"axis {axis}: a value stands twice in {values}", "axes", axis)
        if axis in file.get("fixed"):
            raise file.error(f"{axis} is both fixed and an axis", "axes", axis)


def _check_lists(file: GridFile) -> None:
    for key in ("include", "exclude"):
        listed = file.get(key)
        if not isinstance(listed, list) or not all(isinstance(item, dict) and item for item in listed):
            raise file.error(f"{key}: expected a list of settings, found {listed!r}", key)
        for number in range(len(listed)):
            file.check_keys(OPTIONS, key, number)


def _span(file: GridFile) -> list[Cell]:
    """The cells, before epochs and seeds of the command line."""
    axes, fixed, excluded = file.get("axes"), file.get("fixed"), [_with_numbers(item) for item in file.get("exclude")]
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    spanned = [_cell(file, {**fixed, **point}) for point in points]
    included = [_cell(file, {**fixed, **item}) for item in file.get("include")]

    def matches(cell: Cell, item: dict[str, Any]) -> bool:
        return all(getattr(cell, key) == item[key] for key in item)

    for number, item in enumerate(excluded):
        if not any(matches(cell, item) for cell in (*spanned, *included)):
            raise file.error(f"exclude: {file.get('exclude')[number]} matches no cell", "exclude", number)
    cells = [cell for cell in spanned if not any(matches(cell, item) for item in excluded)] + included
    if not cells:
        raise file.error("no cells are left", "exclude")
    return cells


def _cell(file: GridFile, values: dict[str, Any]) -> Cell:
    cell = Cell(**_with_numbers(values))
    try:
        check(cell)
    except InputError as error:
        raise file.locate_error(error, cell) from None
    return cell


def _with_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with the number that stands for all concepts."""
    return values | ({"concepts": ALL_CONCEPTS} if values.get("concepts") == "all" else {})


def canonical(cell: Cell) -> Cell:
    """The cell with all that its student does not read at the defaults, so that equal work is one cell."""
    from pipeline.training.kinds import KINDS  # only here: a wrong grid is named before torch is loaded

    return KINDS[cell.student].canonical(cell) if cell.student in KINDS else cell


def _read(path: Path) -> GridFile:
    text = lists.whole(path, f"grid {path}")
    try:
        root = yaml.compose(text, Loader=_Loader)
        return GridFile(path, _Loader(text).get_single_data(), dict(_lines(root, (), path)) if root is not None else {})
    except yaml.YAMLError as error:
        raise InputError(f"grid {path}: {' '.join(str(error).split())}") from error


def _lines(node: yaml.Node, position: Position, path: Path) -> Iterator[tuple[Position, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if (before := seen.setdefault(key.value, line)) != line:
                raise InputError(f"grid {path}, line {line}: {key.value!r} stands already at line {before}")
            yield (*position, key.value), line
            yield from _lines(value, (*position, key.value), path)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*position, number), item.start_mark.line + 1
            yield from _lines(item, (*position, number), path)


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return fetch(name_or_path)
    shipped = {path.stem: path for path in (Path(__file__).parent.parent / "grids").glob("*.yaml")}
    if name_or_path not in shipped:
        raise InputError(f"{choices('grid', name_or_path, shipped)}; or the path of a YAML file")
    return shipped[name_or_path]
