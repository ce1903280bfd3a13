"""What a person sees while work goes on: progress bars and tables on the terminal (standard error)."""

from __future__ import annotations

import io
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.analysis.results import sections
from pipeline.analysis.rows import Row, cell_of, section_of
from pipeline.analysis.tables import WIDTH, terminal_table, title, verdict
from pipeline.data.dataset import Dataset
from pipeline.settings import Cell
from pipeline.storage import write_to_stdout
from pipeline.sweep.run import ProgressListener
from pipeline.training.stack import EpochResult
from pipeline.training.trainer import epochs

NOTICE_SECONDS = 15.0  # between two lines where there is no terminal

console = Console(stderr=True, highlight=False)


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        return Text(f"{speed:,.0f} {unit}/s" if speed else unit)


@contextmanager
def _bar(*columns: progress.ProgressColumn) -> Iterator[progress.Progress]:
    """A progress bar on a terminal; elsewhere (a pod's log, a file) a line from time to time."""
    first = progress.TextColumn("[bold]{task.description}"), progress.BarColumn()
    last = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    bar = progress.Progress(*first, *columns, *last, console=console, disable=not console.is_terminal)
    if console.is_terminal:
        with bar:
            yield bar
        return
    begin, ended = time.monotonic(), threading.Event()

    def print_regularly() -> None:
        while not ended.wait(NOTICE_SECONDS):
            _print_tasks(bar, columns)

    thread = threading.Thread(target=print_regularly, name="progress", daemon=True)
    thread.start()
    try:
        yield bar
        if time.monotonic() - begin > NOTICE_SECONDS:
            _print_tasks(bar, columns)
    finally:
        ended.set()
        thread.join()


def _print_tasks(bar: progress.Progress, columns: Sequence[progress.ProgressColumn]) -> None:
    """Print progress, speed and remaining time as one line."""
    for task in bar.tasks:
        parts = [str(column.render(task)).strip() for column in columns]
        parts.append(f"{timedelta(seconds=int(task.elapsed or 0))} so far")
        if not task.finished and task.time_remaining is not None:
            parts.append(f"about {timedelta(seconds=int(task.time_remaining))} left")
        console.print(f"{task.description}: {', '.join(filter(None, parts))}", soft_wrap=True, markup=False)


def counting(work: str, unit: str) -> Callable[[int | None], AbstractContextManager[Callable[[float], None]]]:
    """A bar that counts: a function from a total to a context, which yields the function that advances the bar."""

    @contextmanager
    def shown(total: int | None) -> Iterator[Callable[[float], None]]:
        with _bar(progress.MofNCompleteColumn(), _Rate()) as bar:
            task = bar.add_task(work, total=total, unit=unit)
            yield lambda count: bar.advance(task, count)

    return shown


@contextmanager
def sweep(data: Dataset) -> Iterator[ProgressListener]:
    """One bar for a sweep of cells of these vectors: cells done, the best validation cosine, the time left."""
    with _bar(progress.TextColumn("{task.fields[cells]}"), progress.TextColumn("{task.fields[best]}")) as bar:
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


def lines(*texts: str) -> None:
    """Print lines."""
    write_to_stdout(f"{text}\n" for text in texts)


def results(content: dict[str, Any]) -> None:
    """Print the table and the verdict of each section of a results file."""
    for section in sections(content):
        if section.title:
            lines(f"\n{section.title}:")
        table(*terminal_table(section.results))
        lines(f"{verdict(section.results)}\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; rows whose first value is in parentheses are baselines and are dimmed."""
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
