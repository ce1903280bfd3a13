"""The command line: parses, calls, prints. No logic."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import click

from pipeline import interrupts
from pipeline.errors import InputError, WorkError
from pipeline.settings import (
    Cell,
    EvaluateOptions,
    ExtractOptions,
    PredictOptions,
    PushOptions,
    ReportOptions,
    SweepOptions,
    TrainOptions,
    check,
    flag,
)
from pipeline.storage import output_folder, write_to_stdout

if TYPE_CHECKING:
    from pipeline.extraction.vocabulary import Vocabulary
    from pipeline.student.student import Student


def options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a dataclass; the function receives it, checked, and the command's arguments."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            chosen = settings(**{item.name: values.pop(item.name) for item in fields(settings)})
            check(chosen)
            with _ending_with_the_reader():
                function(chosen, **values)
                write_to_stdout()

        types = get_type_hints(settings)
        command = _verbose(command)
        for item in reversed(fields(settings)):
            command = _click_option(item, types[item.name])(command)
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def _verbose(command: Any) -> Any:
    def show(_context: click.Context, _option: click.Parameter, is_asked: bool) -> None:
        if is_asked:
            logging.getLogger("pipeline").setLevel(logging.DEBUG)

    text = "Also show the libraries' messages and bars, and reasons."
    return click.option("--verbose", is_flag=True, expose_value=False, callback=show, help=text)(command)


@contextmanager
def _ending_with_the_reader() -> Iterator[None]:
    """End quietly where standard output is a pipe that nobody reads any more, as after ``| head``."""
    try:
        yield
    except BrokenPipeError as error:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            raise WorkError(f"a connection was closed by the other side ({error})") from error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes as it ends


class _Optional(click.ParamType[Any]):
    """A value that may be left out; MLproject, whose parameters cannot be absent, leaves it out as an empty string."""

    def __init__(self, basic: Any) -> None:
        self.basic = click.types.convert_type(basic)
        self.name = self.basic.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "" else self.basic.convert(value, param, ctx)


def _click_option(item: Any, kind: Any) -> Callable[[Any], Any]:
    name, default = flag(item), None if item.default is MISSING else item.default
    names = [name, *item.metadata["aliases"], item.name]
    text = item.metadata["help"]
    if kind is bool:
        names = [f"{name}/--no-{name[2:]}", item.name]
        return click.option(*names, default=default, show_default=True, help=text)
    several = get_origin(kind) is tuple
    basic = next((arg for arg in get_args(kind) if arg in (int, float, str)), kind)
    reader = _Optional(basic) if default is None else basic
    bare = {"is_flag": False, "flag_value": item.metadata["bare"]} if item.metadata["bare"] else {}
    return click.option(
        *names, type=reader, default=default, multiple=several, show_default=default is not None, help=text, **bare
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def cli() -> None:
    """Small students that reproduce a language model's activation vectors from a concept's text.

    Runs are tracked in MLflow: at MLFLOW_TRACKING_URI, or in sqlite:///mlflow.db (see them with: mlflow ui).
    """


@cli.command()
@options_of(ExtractOptions)
def extract(options: ExtractOptions) -> None:
    """Run a teacher over the concepts and keep its activation vectors.

    Example: python -m pipeline extract --teacher gpt2 --layers 4,mid,8
    """
    from pipeline.commands import display
    from pipeline.commands.extract import run_extract
    from pipeline.processes import start

    told = run_extract(
        options, start(), display.counting("extract", "concepts"), display.counting("vocabulary", "tokens")
    )
    if told:
        click.echo(told)


@cli.command()
@options_of(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train one student and leave its folder.

    Example: python -m pipeline train --student mlp --hidden-dim 512 --concepts 700
    """
    from pipeline.sweep.grid import canonical

    cell = canonical(Cell(**{item.name: getattr(options, item.name) for item in fields(Cell)}))
    with output_folder(options.output or "student") as folder:
        _sweep("train", [cell], options, folder.parent / "results", folder if options.output else None)


@cli.command()
@options_of(SweepOptions)
def sweep(options: SweepOptions) -> None:
    """Train every cell of a grid, then write its report.

    Example: python -m pipeline sweep --grid scaling --seeds 3
    """
    from pipeline.sweep.grid import read_grid, vectors_of

    name, cells = read_grid(options.grid, options.epochs, options.seeds)
    options = replace(options, vectors=options.vectors or vectors_of(options.grid))
    if options.max_concepts is not None:
        cells = [cell for cell in cells if cell.concepts <= options.max_concepts]
    if options.dry_run:
        _show_plan(name, cells, options)
        return
    if options.shard != "0/1" and not options.resume:
        raise InputError("--no-resume with --shard: shards know each other by the sweep's id; give a new --sweep-id")
    with output_folder(options.output) as output:
        _sweep(name, cells, options, output, None, options.sweep_id, options.shard)


def _show_plan(name: str, cells: list[Cell], options: SweepOptions) -> None:
    from pipeline.commands import display
    from pipeline.data.dataset import Dataset
    from pipeline.data.vectors import read_vectors
    from pipeline.processes import parse_shard, start
    from pipeline.sweep.cost import expected_seconds, plan_rows
    from pipeline.sweep.run import prepare
    from pipeline.tracking import fetch

    data = Dataset(read_vectors(fetch(str(options.vectors))))
    cells = prepare(cells, data, options.grid)
    accelerator, shard = start(), parse_shard(options.shard)
    if accelerator.is_main_process:
        workers = shard.count * accelerator.num_processes
        display.table(*plan_rows(cells, data, workers))
        seconds = expected_seconds(cells, data, accelerator.device) / workers
        click.echo(f"{name}: {len(cells)} cells, about {seconds:,.0f} s here; nothing was trained")


def _sweep(
    name: str,
    cells: list[Cell],
    options: TrainOptions | SweepOptions,
    output: Path,
    student_folder: Path | None,
    sweep_id: str | None = None,
    shard: str = "0/1",
) -> None:
    from pipeline.commands import display
    from pipeline.data.dataset import Dataset
    from pipeline.data.vectors import read_vectors
    from pipeline.extraction.vocabulary import find
    from pipeline.processes import parse_shard, start
    from pipeline.storage import writable
    from pipeline.sweep.run import Incomplete, prepare, run_sweep
    from pipeline.tracking import connect, fetch
    from pipeline.training.export import export_or_fallback

    part = parse_shard(shard)
    data = Dataset(read_vectors(fetch(str(options.vectors))))
    cells = prepare(cells, data, options.grid if isinstance(options, SweepOptions) else None)
    for path in (*([student_folder / "config.json"] if student_folder else []), output / "results.json"):
        writable(path)
    tracker, accelerator = connect("sweep"), start()
    bar = display.counting("vocabulary", "tokens")

    def vocabulary() -> Vocabulary | None:
        place, load = str(options.vectors), (options.device_map, options.trust_remote_code)
        return find(data.vectors, place, accelerator.device, bar, *load)

    def report(results: dict[str, Any], stem: str, students: list[Student]) -> list[Path]:
        if not options.report:
            return []
        from pipeline.commands.report import write_report  # only by the worker that reports: plots take seconds to load

        return write_report(results, stem, output, students, data.vectors)

    with display.sweep(lambda cell: data.omit_default(cell).name) as watcher:
        done = run_sweep(
            name,
            cells,
            data,
            tracker,
            accelerator,
            params=asdict(options),
            vectors_uri=str(options.vectors),
            output=output,
            student_folder=student_folder,
            sweep_id=sweep_id,
            resume=options.resume,
            shard=part,
            report=report,
            export=lambda trained: export_or_fallback(trained, data, vocabulary()),
            baselines=isinstance(options, SweepOptions),  # train leaves the student that was asked for
            register=options.register,
            watcher=watcher,
        )
    if done is None:
        return
    if isinstance(done, Incomplete):
        click.echo(
            f"sweep {done.sweep_id}: shard {shard} is done, {done.finished} of {done.cells} cells are finished; "
            + (
                "the shard that completes the sweep writes the report"
                if done.finished < done.cells
                else f"the report stands in MLflow, and `report --sweep-id {done.sweep_id}` draws it again"
            )
        )
        return
    _show(done.results)
    for title, path in zip(["results", "report"] + [""] * len(done.files), [done.path, *done.files], strict=False):
        click.echo(f"{title:10}{path}")
    for left in done.left:
        click.echo(f"student   {left.folder} ({left.student.summary})")
        click.echo(f"          {left.reason}")
    click.echo(f"MLflow    {done.run.address}")


def _show(results: dict[str, Any]) -> None:
    """Print the table and the verdict of each section."""
    from pipeline.analysis.tables import terminal_table, verdict
    from pipeline.commands import display
    from pipeline.sweep.results import sections

    for section in sections(results):
        if section.title:
            click.echo(f"\n{section.title}:")
        display.table(*terminal_table(section.results))
        click.echo(f"{verdict(section.results)}\n")


@cli.command()
@options_of(ReportOptions)
def report(options: ReportOptions) -> None:
    """Draw the tables and plots of a sweep, from its results file or from MLflow.

    Example: python -m pipeline report --results results/scaling_results_20260101T000000Z.json
    """
    from pipeline.commands.report import predict_sections, write_report
    from pipeline.data.dataset import Dataset
    from pipeline.sweep.results import load_sweep, vectors_for

    stem, results, students = load_sweep(options.results, options.sweep_id)
    vectors = vectors_for(results["grid"], options.vectors, results.get("vectors"))
    with output_folder(options.output) as output:
        if options.predict is not None:
            for line in predict_sections(results, options.predict, Dataset(vectors), output):
                click.echo(line)
            return
        written = write_report(results, stem, output, students, vectors)
    _show(results)
    for path in written:
        click.echo(path)


@cli.command()
@options_of(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure trained students on the test concepts, and in the teacher.

    Example: python -m pipeline evaluate --teacher smollm2-135m
    """
    from pipeline.commands import display
    from pipeline.commands.evaluate import run_evaluate
    from pipeline.processes import start

    with output_folder(options.output) as output:
        bar = display.counting("evaluate", "students")
        head, rows, written = run_evaluate(replace(options, output=str(output)), start(), bar)
    display.table(head, rows)
    for path in written:
        click.echo(path)


@cli.command()
@click.argument("texts", nargs=-1)
@options_of(PredictOptions)
def predict(options: PredictOptions, texts: tuple[str, ...]) -> None:
    r"""Turn TEXTS into activation vectors with a trained student.

    \b
    Examples:
      python -m pipeline predict volcano "slow cooking" --nearest 5
      python -m pipeline predict --file words.txt --output vectors.npy
    """
    from pipeline.commands import display
    from pipeline.commands.predict import run_predict

    rows = run_predict(options, texts, display.counting("predict", "texts"))
    if rows is not None:
        display.table(*rows)


@cli.command()
@click.argument("source")
@click.argument("repository")
@options_of(PushOptions)
def push(options: PushOptions, source: str, repository: str) -> None:
    """Publish SOURCE, a student folder or a vectors file, as REPOSITORY (owner/name) on the Hugging Face hub.

    Log in first: hf auth login, or set HF_TOKEN. Students load from there again: Student.load("hf://owner/name").
    """
    from pipeline.commands import push

    click.echo(push.push(Path(source), repository, options.licence, options.private))


def main() -> None:
    """Run the command line with the project's exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "httpcore", "accelerate", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):  # letters that the terminal's encoding lacks are no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with interrupts.handle_signals():
            cli(standalone_mode=False)
    except InputError as error:
        _leave(f"error: {error}", 2)
    except WorkError as error:
        _leave(f"error: {error}", 1)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "python -m pipeline"
        _leave(f"error: {error.format_message()} (see {command} --help)", 2)
    except (KeyboardInterrupt, click.Abort):
        interrupts.exit_interrupted()


def _leave(line: str, code: int) -> None:
    click.echo(" ".join(line.split()), err=True)
    sys.exit(code)
