"""Progress bars, lines and tables on the terminal."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from rich import box, progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.storage import write_to_stdout

NOTICE_SECONDS = 15.0  # between two lines where there is no terminal

console = Console(stderr=True, highlight=False)


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        return Text(f"{speed:,.0f} {unit}/s" if speed else "")


@contextmanager
def progress_bar(*columns: progress.ProgressColumn) -> Iterator[progress.Progress]:
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
        with progress_bar(progress.MofNCompleteColumn(), _Rate()) as bar:
            task = bar.add_task(work, total=total, unit=unit)
            yield lambda count: bar.advance(task, count)

    return shown


def lines(*texts: str) -> None:
    """Print lines."""
    write_to_stdout(f"{text}\n" for text in texts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; rows whose first value is in parentheses are baselines and are dimmed."""
    from pipeline.analysis.tables import WIDTH, title  # only here: it loads torch, which bars need not wait for

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
