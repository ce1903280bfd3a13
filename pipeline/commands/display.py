"""What a person sees while work goes on: progress bars and tables on the terminal (standard error)."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pipeline.analysis.rows import section_of
from pipeline.analysis.tables import WIDTH, title
from pipeline.settings import Cell
from pipeline.storage import write_to_stdout
from pipeline.sweep.run import Watcher
from pipeline.training.stack import EpochResult as Epoch
from pipeline.training.trainer import epochs

NOTICE_SECONDS = 15.0  # between two lines where there is no terminal

console = Console(stderr=True, highlight=False)
BEYOND = 2.0  # no cosine is better: there is no best across blocks or splits


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed else f"{self.unit}")


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Progress]:
    """A progress bar; where no terminal shows it (a pod's log, a file), a line now and then says the same."""
    bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), *columns, TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    if console.is_terminal:
        with bar:
            yield bar
        return
    begin, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(NOTICE_SECONDS):
            for task in bar.tasks:
                _print_line(task, columns)

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield bar
        if time.monotonic() - begin > NOTICE_SECONDS:
            for task in bar.tasks:
                _print_line(task, columns)
    finally:
        ended.set()
        thread.join()


def _print_line(task: Task, columns: Sequence[ProgressColumn]) -> None:
    """One line without a terminal: how far, how fast, and how long it takes yet."""
    parts = [str(column.render(task)).strip() for column in columns]
    parts.append(f"{timedelta(seconds=int(task.elapsed or 0))} so far")
    if not task.finished and task.time_remaining is not None:
        parts.append(f"about {timedelta(seconds=int(task.time_remaining))} left")
    line = f"{task.description}: {', '.join(part for part in parts if part)}"
    console.print(line, soft_wrap=True, markup=False)


def counting(work: str, unit: str) -> Callable[[int | None], AbstractContextManager[Callable[[float], None]]]:
    """A bar that counts: given how many there are, it gives the function that advances it."""

    @contextmanager
    def shown(total: int | None) -> Iterator[Callable[[float], None]]:
        with _bar(MofNCompleteColumn(), _Rate(unit)) as bar:
            task = bar.add_task(work, total=total)
            yield lambda count: bar.advance(task, count)

    return shown


@contextmanager
def sweep(name_of: Callable[[Cell], str]) -> Iterator[Watcher]:
    """One display for a whole sweep: cells done, the current and the best validation cosine, time left."""
    with _bar(TextColumn("{task.fields[cells]}"), TextColumn("{task.fields[best]}")) as bar:
        task = bar.add_task("train", total=None, cells="", best="")
        state = {"cells": 0, "todo": 0, "best": -2.0}
        reached: dict[Cell, int] = {}  # of each cell the last epoch

        def start(todo: Sequence[Cell], done: Sequence[Cell]) -> None:
            several = len({section_of(vars(cell)) for cell in (*todo, *done)}) > 1
            state.update(cells=0, todo=len(todo), best=BEYOND if several else -2.0)
            if done:
                console.print(
                    f"{len(done)} of {len(todo) + len(done)} cells were finished before (--no-resume repeats them)"
                )
            # An epoch takes time in proportion to its concepts, more or less.
            bar.update(task, total=sum(epochs(cell) * cell.concepts for cell in todo), cells=f"0/{len(todo)} cells")

        def progress(step: Epoch) -> None:
            if step.val_cosine > state["best"]:
                state["best"] = step.val_cosine
                bar.update(task, best=f"val cosine {step.val_cosine:.3f} ({name_of(step.cell)})")
            bar.advance(task, (step.epoch - reached.get(step.cell, 0)) * step.cell.concepts)
            reached[step.cell] = step.epoch

        def finished(row: dict[str, Any]) -> None:
            state["cells"] += 1
            cell = Cell(**{name: row[name] for name in Cell.__dataclass_fields__})
            bar.advance(
                task, (epochs(cell) - reached.get(cell, 0)) * cell.concepts
            )  # stopped early, or by another worker
            reached[cell] = epochs(cell)
            bar.update(task, cells=f"{state['cells']}/{state['todo']} cells")

        yield Watcher(start, progress, finished)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; rows whose first value is in parentheses are baselines and stand dimmed."""
    shown = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        shown.add_column(title(name), justify="left" if name in ("student", "cell") else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row, style="dim" if row[0].startswith("(") else "")
    out = Console(highlight=False)
    if out.is_terminal:
        out.print(shown)
        return
    text = io.StringIO()
    Console(file=text, highlight=False, width=max(out.width, WIDTH)).print(shown)
    write_to_stdout([text.getvalue()])
