"""Cells before any work begins: checked against the data, and the keys that identify their work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from pipeline.analysis.rows import ridge_baseline
from pipeline.data.dataset import Dataset
from pipeline.errors import InputError, choices
from pipeline.settings import ALL_CONCEPTS, RESULTS_VERSION, Cell
from pipeline.sweep.grid import GridFile
from pipeline.training.curriculum import CURRICULA
from pipeline.training.kinds import KINDS
from pipeline.training.objectives import parse_objective
from pipeline.training.stack import PRECISIONS, precision_of_cell
from pipeline.training.transformer import HEAD_DIM

MAX_SOLVED = 12_000  # rows of the matrix that a ridge regression decomposes, which takes about 5 GB then
CHOICES = {
    "student": tuple(KINDS),
    "precision": ("auto", *PRECISIONS),
    "curriculum": CURRICULA,
    "evaluations": ("every", "log"),
}


def prepare(cells: Sequence[Cell], data: Dataset, file: GridFile | None = None) -> list[Cell]:
    """Check every cell, each once, and fill in what it leaves to the data; errors name the line of a grid."""
    ready = []
    for cell in cells:
        try:
            ready.append(fill_in(cell, data))
            _check(ready[-1], data)
        except InputError as error:
            raise (error if file is None else file.locate_error(error, cell)) from None
    return list(dict.fromkeys(ready))  # a grid may ask for the middle block by its number and by default


def fill_in(cell: Cell, data: Dataset) -> Cell:
    """The cell with the middle block where it names none, and with the number of concepts where it asks for all."""
    concepts = len(data.rows("train", cell.split)) if cell.concepts == ALL_CONCEPTS else cell.concepts
    return replace(cell, concepts=concepts, layer=data.vectors.middle_layer if cell.layer is None else cell.layer)


def _check(cell: Cell, data: Dataset) -> None:
    parse_objective(cell.objective)
    for option, known in CHOICES.items():
        if (value := getattr(cell, option)) not in known:
            raise choices(option, value, known)
    if cell.student == "transformer" and cell.hidden_dim % HEAD_DIM:
        raise InputError(f"--hidden-dim {cell.hidden_dim}: a transformer's is a multiple of {HEAD_DIM}")
    data.check(cell)
    features = data.feature_count(ridge_baseline(cell))
    if min(cell.concepts, features) > MAX_SOLVED:
        found = f"{features:,} features of {cell.concepts:,} concepts"
        limit = f"the ridge regression beside every cell is solved for at most {MAX_SOLVED:,} of one of the two"
        raise InputError(f"--inputs {cell.inputs}: {found}; {limit}")


def cell_key(cell: Cell, vectors_identity: str, default_precision: str) -> str:
    """Identity of a cell's work: a hash of its configuration, data, precision and the version of the results."""
    return _hash([asdict(cell), precision_of_cell(cell, default_precision), vectors_identity, RESULTS_VERSION])


def work_key(cells: Sequence[Cell], vectors_identity: str) -> str:
    """Identity of a sweep's work for workers of any results version."""
    # Without the options at their defaults, which another version may not know.
    defaults = {name: field.default for name, field in Cell.__dataclass_fields__.items()}
    chosen = [{name: value for name, value in asdict(cell).items() if value != defaults[name]} for cell in cells]
    return _hash([sorted(json.dumps(cell, sort_keys=True) for cell in chosen), vectors_identity])


def _hash(content: list[object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
