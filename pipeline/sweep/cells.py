"""Cells before any work begins: checked against the data, and the keys that identify their work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from pipeline.data.dataset import Dataset
from pipeline.errors import InputError, choices
from pipeline.settings import RESULTS_VERSION, Cell
from pipeline.sweep.grid import GridFile
from pipeline.training.curriculum import CURRICULA
from pipeline.training.kinds import KINDS
from pipeline.training.objectives import parse_objective
from pipeline.training.stack import PRECISIONS, precision_of_cell
from pipeline.training.transformer import HEAD_DIM

CHOICES = {
    "student": tuple(KINDS),
    "precision": ("auto", *PRECISIONS),
    "curriculum": CURRICULA,
    "evaluations": ("every", "log"),
}


def prepare(cells: Sequence[Cell], data: Dataset, file: GridFile | None = None) -> list[Cell]:
    """Check every cell, and fill in the block of those that name none.

    Args:
        cells: the cells.
        data: the vectors.
        file: the grid of the cells, for errors that name the line.

    Returns:
        The cells, each once.

    Raises:
        InputError: an unknown choice, too many concepts, or a block that the file lacks.
    """
    ready = []
    for cell in cells:
        layer = data.vectors.middle_layer if cell.layer is None else cell.layer
        ready.append(replace(cell, layer=layer))
        try:
            _check(ready[-1], data)
        except InputError as error:
            raise (error if file is None else file.locate_error(error, cell)) from None
    return list(dict.fromkeys(ready))  # a grid may ask for the middle block by its number and by default


def _check(cell: Cell, data: Dataset) -> None:
    parse_objective(cell.objective)
    for option, known in CHOICES.items():
        if (value := getattr(cell, option)) not in known:
            raise choices(option, value, known)
    if cell.student == "transformer" and cell.hidden_dim % HEAD_DIM:
        raise InputError(f"--hidden-dim {cell.hidden_dim}: a transformer's is a multiple of {HEAD_DIM}")
    data.check(cell)


def cell_key(cell: Cell, vectors_identity: str, default_precision: str) -> str:
    """Identity of a cell's work: configuration, data, precision and version of the results.

    Args:
        cell: the configuration.
        vectors_identity: of the data.
        default_precision: the precision of cells that leave it open.

    Returns:
        A hash of 32 hexadecimal digits.
    """
    content = [asdict(cell), precision_of_cell(cell, default_precision), vectors_identity, RESULTS_VERSION]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def work_key(cells: Sequence[Cell], vectors_identity: str) -> str:
    """Identity of a sweep's work for workers of any results version."""
    # Without the options at their defaults, which another version may not know.
    defaults = {name: field.default for name, field in Cell.__dataclass_fields__.items()}
    chosen = [{name: value for name, value in asdict(cell).items() if value != defaults[name]} for cell in cells]
    content = json.dumps([sorted(json.dumps(cell, sort_keys=True) for cell in chosen), vectors_identity])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
