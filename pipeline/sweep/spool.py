"""Work of a sweep on disk until MLflow has it: finished cells, and snapshots of unfinished stacks.

``<folder>/<cell key>.<worker>/`` is a finished cell, ``cell.json`` with its row and curves and ``student/``.
``<folder>/<cell key>.stack`` is the snapshot of a stack, by the key of one of its members. The folder is removed when
it is empty.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.errors import InputError
from pipeline.settings import Cell
from pipeline.storage import write_atomically
from pipeline.student.student import Student
from pipeline.training.stack import Snapshot

WRITE_ATTEMPTS = 5
GENERATOR = "generator."  # of dropout, by seed, among the tensors of a snapshot


@dataclass(frozen=True)
class Spool:
    """A folder of work that is not tracked yet."""

    folder: Path  # made when first needed; workers may share it
    worker: str = field(default_factory=lambda: secrets.token_hex(4))

    def save_cell(self, key: str, row: Mapping[str, Any], student: Student) -> None:
        """Write a finished cell."""
        folder, text = self._own_folder(key), json.dumps(row)

        def write() -> None:
            student.save(folder / "student")
            # The row comes last: a folder that has one is complete.
            write_atomically(folder / "cell.json", lambda part: part.write_text(text, encoding="utf-8"))

        _retry_write(write)

    def row(self, key: str) -> dict[str, Any] | None:
        """The row of a finished cell; None where no complete one is here."""
        for folder in self._folders(key):
            with contextlib.suppress(OSError, ValueError):
                row: dict[str, Any] = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
                return row
        return None

    def folder_of(self, key: str) -> Path | None:
        """The folder of a complete finished cell; None once a worker on this disk has removed it."""
        return next((folder for folder in self._folders(key) if (folder / "cell.json").is_file()), None)

    def remove_cell(self, key: str) -> None:
        """Remove a finished cell that MLflow has."""
        for folder in self._folders(key):
            shutil.rmtree(folder, ignore_errors=True)
        self._remove_if_empty()

    def remove_own_cell(self, key: str) -> None:
        """Remove this worker's copy of a cell that another worker has claimed, whose own copy stays."""
        shutil.rmtree(self._own_folder(key), ignore_errors=True)
        self._remove_if_empty()

    def clear(self, keys: Iterable[str]) -> None:
        """Remove everything about tracked cells, with what workers that were killed have left of them."""
        wanted = set(keys)  # one look at the folder for all
        for name in self._names():
            key, _, rest = name.removeprefix(".").partition(".")  # a file that is not whole: .<cell key>.stack.<part>
            if key in wanted and rest.startswith("stack"):
                (self.folder / name).unlink(missing_ok=True)
            elif key in wanted:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self._remove_if_empty()

    def _own_folder(self, key: str) -> Path:
        return self.folder / f"{key}.{self.worker}"

    def _folders(self, key: str) -> list[Path]:
        """The folders of a cell, this worker's first."""
        paths = [self.folder / name for name in self._names() if name.startswith(f"{key}.")]
        found = [path for path in paths if path.is_dir()]
        return sorted(found, key=lambda path: path != self._own_folder(key))

    def _names(self) -> list[str]:
        """The names of all that lies in the folder."""
        try:
            return [path.name for path in self.folder.iterdir()]  # a glob is several times slower
        except FileNotFoundError:
            return []

    def save_snapshot(self, snapshot: Snapshot, keys: Mapping[Cell, str], name: str) -> None:
        """Write the snapshot of a stack under a name, in place of an earlier one."""
        members = [one | {"cell": asdict(one["cell"]), "cell_key": keys[one["cell"]]} for one in snapshot.members]
        tensors = snapshot.tensors | {f"{GENERATOR}{seed}": state for seed, state in snapshot.generators.items()}
        header = {"step": str(snapshot.step), "members": json.dumps(members)}
        path = self.folder / f"{name}.stack"
        _retry_write(lambda: write_atomically(path, lambda part: save_file(tensors, part, header)))

    def load_snapshots(self, keys: Mapping[Cell, str], cells: Sequence[Cell]) -> list[tuple[list[Cell], Snapshot]]:
        """The readable snapshots that hold some of these cells, each with those cells."""
        wanted = {keys[cell]: cell for cell in cells}
        found = []
        for path, members in self._snapshots():
            if own := [wanted.pop(member["cell_key"]) for member in members if member["cell_key"] in wanted]:
                with safe_open(path, "pt") as file:
                    step = int(file.metadata()["step"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                names = [name for name in tensors if GENERATOR in name]
                generators = {int(name.removeprefix(GENERATOR)): tensors.pop(name) for name in names}
                for member in members:
                    member["cell"] = Cell(**member["cell"])
                found.append((own, Snapshot(step, members, tensors, generators)))
        return found

    def remove_snapshots(self, finished: set[str]) -> None:
        """Remove the snapshots whose members are all finished, by their keys."""
        for path, members in self._snapshots():
            if {member["cell_key"] for member in members} <= finished:
                path.unlink(missing_ok=True)
        self._remove_if_empty()

    def _snapshots(self) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
        for path in sorted(self.folder.glob("*.stack")):
            with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError), safe_open(path, "pt") as file:
                yield path, json.loads(file.metadata()["members"])

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):  # not empty, or never made
            self.folder.rmdir()


def _retry_write(write: Callable[[], None]) -> None:
    """Write, and again where another worker has removed a folder meanwhile, as it does with finished cells."""
    for _ in range(WRITE_ATTEMPTS - 1):
        try:
            return write()
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return write()
