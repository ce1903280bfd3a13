"""What a sweep keeps on disk while MLflow does not have it: finished cells, and the state of unfinished stacks.

``<folder>/<cell key>.<worker>/`` is a finished cell, ``cell.json`` with its row and curves and ``student/``.
``<folder>/<cell key>.stack`` is the state of a stack, by the key of one of its members. When all is well the folder is
empty.
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

WRITES = 5  # tries, while others remove
GENERATOR = "generator."  # of dropout, by seed, among the tensors of a state


@dataclass(frozen=True)
class Spool:
    """A folder of work that is done and not yet tracked.

    Args:
        folder: made when first needed; workers may share it.
    """

    folder: Path
    worker: str = field(default_factory=lambda: secrets.token_hex(4))

    def add(self, key: str, row: Mapping[str, Any], student: Student) -> None:
        """Keep a finished cell."""
        home = self.folder / f"{key}.{self.worker}"
        text = json.dumps(row)

        def write() -> None:
            student.save(home / "student")
            # The row comes last: a folder with one is whole.
            write_atomically(home / "cell.json", lambda part: part.write_text(text, encoding="utf-8"))

        _among_others(write)

    def row(self, key: str) -> dict[str, Any] | None:
        """The row of a finished cell, where one is here and whole."""
        for path in self._homes(key):
            with contextlib.suppress(OSError, ValueError):
                row: dict[str, Any] = json.loads((path / "cell.json").read_text(encoding="utf-8"))
                return row
        return None

    def home(self, key: str) -> Path | None:
        """The folder of a finished cell that is here and whole; None once a worker on this disk has removed it."""
        return next((path for path in self._homes(key) if (path / "cell.json").is_file()), None)

    def drop(self, key: str) -> None:
        """Forget a finished cell: MLflow has it."""
        for path in self._homes(key):
            shutil.rmtree(path, ignore_errors=True)
        self._tidy()

    def drop_own(self, key: str) -> None:
        """Forget a finished cell that another worker has claimed; what that one has of it stays."""
        shutil.rmtree(self.folder / f"{key}.{self.worker}", ignore_errors=True)
        self._tidy()

    def clear(self, keys: Iterable[str]) -> None:
        """Forget all about finished cells, also what workers that were killed have left between MLflow and here."""
        for key in keys:
            self.drop(key)
            for path in [*self.folder.glob(f"{key}.stack"), *self.folder.glob(f".{key}.stack.*")]:
                path.unlink(missing_ok=True)
        self._tidy()

    def _homes(self, key: str) -> list[Path]:
        """The folders of a cell, this worker's first."""
        own = self.folder / f"{key}.{self.worker}"
        return sorted((path for path in self.folder.glob(f"{key}.*") if path.is_dir()), key=lambda path: path != own)

    def keep(self, snapshot: Snapshot, keys: Mapping[Cell, str], name: str) -> None:
        """Keep the state of a stack under a name, in place of an earlier one."""
        members = [
            member | {"cell": asdict(member["cell"]), "cell_key": keys[member["cell"]]} for member in snapshot.members
        ]
        tensors = snapshot.tensors | {f"{GENERATOR}{seed}": state for seed, state in snapshot.generators.items()}
        header = {"step": str(snapshot.step), "members": json.dumps(members)}
        path = self.folder / f"{name}.stack"
        _among_others(lambda: write_atomically(path, lambda part: save_file(tensors, part, header)))

    def unfinished(self, keys: Mapping[Cell, str], cells: Sequence[Cell]) -> list[tuple[list[Cell], Snapshot]]:
        """The cells that have a state here, stack by stack: the cells and the state.

        States that cannot be read are passed over: their cells start again.
        """
        wanted = {keys[cell]: cell for cell in cells}
        found = []
        for path, members in self._states():
            own = [wanted.pop(member["cell_key"]) for member in members if member["cell_key"] in wanted]
            if own:
                with safe_open(path, "pt") as file:
                    step = int(file.metadata()["step"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                generators = {
                    int(name.removeprefix(GENERATOR)): tensors.pop(name) for name in list(tensors) if GENERATOR in name
                }
                for member in members:
                    member["cell"] = Cell(**member["cell"])
                found.append((own, Snapshot(step, members, tensors, generators)))
        return found

    def forget(self, finished: set[str]) -> None:
        """Remove the states of stacks all of whose members are finished."""
        for path, members in self._states():
            if {member["cell_key"] for member in members} <= finished:
                path.unlink(missing_ok=True)
        self._tidy()

    def _states(self) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
        for path in sorted(self.folder.glob("*.stack")):
            with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError), safe_open(path, "pt") as file:
                yield path, json.loads(file.metadata()["members"])

    def _tidy(self) -> None:
        try:
            self.folder.rmdir()
        except OSError:  # not empty, or never made
            return


def _among_others(write: Callable[[], None]) -> None:
    """Write, and again where a folder went away meanwhile: other workers remove what they know to be finished."""
    for _ in range(WRITES - 1):
        try:
            return write()
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return write()
