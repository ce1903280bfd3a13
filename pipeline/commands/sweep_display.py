"""What a person sees of a sweep: one bar while it trains, and the tables of its results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import TextColumn

from pipeline.analysis.results import sections
from pipeline.analysis.rows import Row, cell_of, section_of
from pipeline.analysis.tables import leading_cells, terminal_table, verdict
from pipeline.commands.display import console, lines, progress_bar, table
from pipeline.data.dataset import Dataset
from pipeline.settings import Cell
from pipeline.sweep.run import ProgressListener
from pipeline.training.stack import EpochResult
from pipeline.training.trainer import epochs

TERMINAL_CELLS = 50  # of a section at the most


@contextmanager
def watch_sweep(data: Dataset) -> Iterator[ProgressListener]:
    """One bar for a sweep of cells of these vectors: cells done, the best validation cosine, the time left."""
    with progress_bar(TextColumn("{task.fields[cells]}"), TextColumn("{task.fields[best]}")) as bar:
        task = bar.add_task("train", total=None, cells="", best="")
        number_done = number_todo = 0
        best = -1.0
        last_epochs: Counter[Cell] = Counter()

        def on_start(todo: Sequence[Cell], done: Sequence[Cell]) -> None:
            nonlocal number_todo, best
            number_todo = len(todo)
            if len({section_of(vars(cell)) for cell in (*todo, *done)}) > 1:
                best = math.inf  # cosines of several blocks or splits have no best
            if done:
                known = f"{len(done)} of {len(todo) + len(done)} cells were finished before"
                console.print(f"{known} (--no-resume repeats them)")
            # The time of an epoch is roughly proportional to its concepts.
            bar.update(task, total=sum(epochs(cell) * cell.concepts for cell in todo), cells=f"0/{len(todo)} cells")

        def advance(cell: Cell, epoch: int) -> None:
            bar.advance(task, (epoch - last_epochs[cell]) * cell.concepts)
            last_epochs[cell] = epoch

        def on_epoch(step: EpochResult) -> None:
            nonlocal best
            if step.val_cosine > best:
                best = step.val_cosine
                bar.update(task, best=f"val cosine {best:.3f} ({data.omit_default(step.cell).name})")
            advance(step.cell, step.epoch)

        def on_cell(row: Row) -> None:
            nonlocal number_done
            number_done += 1
            advance(cell_of(row), epochs(cell_of(row)))  # it may have stopped early, or trained in another worker
            bar.update(task, cells=f"{number_done}/{number_todo} cells")

        yield ProgressListener(on_start, on_epoch, on_cell)


def show_results(content: dict[str, Any], path: Path) -> None:
    """Print the table and the verdict of each section of a results file; ``path`` has the cells that it leaves out."""
    for section in sections(content):
        if section.title:
            lines(f"\n{section.title}:")
        shown = leading_cells(section.results, TERMINAL_CELLS)
        table(*terminal_table(shown))
        if more := len(section.results["cells"]) - len(shown["cells"]):
            lines(f"The {TERMINAL_CELLS} best cells by validation; {more} more stand in {path}")
        lines(f"{verdict(section.results)}\n")
