"""The command line: parses, calls, prints. No logic."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from pipeline import interrupts, settings
from pipeline.errors import InputError, WorkError
from pipeline.storage import write_to_stdout


def options_of(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a dataclass; the function receives it, checked, and the command's arguments."""
    types = get_type_hints(kind)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            chosen = kind(**{name: values.pop(name) for name in types})
            settings.check(chosen)
            with _allow_closed_output():
                function(chosen, **values)
                write_to_stdout()

        text = "Also show the libraries' messages and bars, and reasons."
        command = click.option("--verbose", is_flag=True, expose_value=False, callback=_set_level, help=text)(command)
        for item in reversed(fields(kind)):
            command = _click_option(item, types[item.name])(command)
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def _set_level(_context: click.Context, _option: click.Parameter, is_verbose: bool) -> None:
    if is_verbose:
        logging.getLogger("pipeline").setLevel(logging.DEBUG)


@contextmanager
def _allow_closed_output() -> Iterator[None]:
    """End quietly where standard output is a pipe that nobody reads any more, as after ``| head``."""
    try:
        yield
    except BrokenPipeError as error:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            raise WorkError(f"a connection was closed by the other side ({error})") from error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes as it ends


class _OptionalType(click.ParamType[Any]):
    """An optional value, which is empty in the MLproject because parameters cannot be absent there."""

    def __init__(self, basic: Any) -> None:
        self.basic = click.types.convert_type(basic)
        self.name = self.basic.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "" else self.basic.convert(value, param, ctx)


def _click_option(item: Any, kind: Any) -> Callable[[Any], Any]:
    name, default, text = settings.flag(item), item.default, item.metadata["help"]
    if kind is bool:
        return click.option(f"{name}/--no-{name[2:]}", item.name, default=default, show_default=True, help=text)
    names, is_multiple = (name, *item.metadata.get("aliases", ()), item.name), get_origin(kind) is tuple
    basic = next((arg for arg in get_args(kind) if arg in (int, float, str)), kind)
    value = _OptionalType(basic) if default is None else basic
    bare = {"is_flag": False, "flag_value": item.metadata["bare"]} if "bare" in item.metadata else {}
    return click.option(
        *names, type=value, default=default, multiple=is_multiple, show_default=default is not None, help=text, **bare
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def cli() -> None:
    """Small students that reproduce a language model's activation vectors from a concept's text.

    Runs are tracked in MLflow: at MLFLOW_TRACKING_URI, or in sqlite:///mlflow.db (see them with: mlflow ui).
    """


@cli.command()
@options_of(settings.ExtractOptions)
def extract(options: settings.ExtractOptions) -> None:
    """Run a teacher over the concepts and keep its activation vectors.

    Example: python -m pipeline extract --teacher gpt2 --layers 4,mid,8
    """
    from pipeline.commands.extract import run_extract

    run_extract(options)


@cli.command()
@options_of(settings.TrainOptions)
def train(options: settings.TrainOptions) -> None:
    """Train one student and leave its folder.

    Example: python -m pipeline train --student mlp --hidden-dim 512 --concepts 700
    """
    from pipeline.commands.sweep import train_student

    train_student(options)


@cli.command()
@options_of(settings.SweepOptions)
def sweep(options: settings.SweepOptions) -> None:
    """Train every cell of a grid, then write its report.

    Example: python -m pipeline sweep --grid scaling --seeds 3
    """
    from pipeline.sweep.grid import read_grid

    grid = read_grid(options.grid, options.epochs, options.seeds)  # before the libraries that take seconds to load
    from pipeline.commands.sweep import train_grid

    train_grid(options, grid)


@cli.command()
@options_of(settings.ReportOptions)
def report(options: settings.ReportOptions) -> None:
    """Draw the tables and plots of a sweep, from its results file or from MLflow.

    Example: python -m pipeline report --results results/scaling_results_20260101T000000Z.json
    """
    from pipeline.commands.report import run_report

    run_report(options)


@cli.command()
@options_of(settings.EvaluateOptions)
def evaluate(options: settings.EvaluateOptions) -> None:
    """Measure trained students on the test concepts, and in the teacher.

    Example: python -m pipeline evaluate --teacher smollm2-135m
    """
    from pipeline.commands.evaluate import run_evaluate

    run_evaluate(options)


@cli.command()
@click.argument("texts", nargs=-1)
@options_of(settings.PredictOptions)
def predict(options: settings.PredictOptions, texts: tuple[str, ...]) -> None:
    """Turn TEXTS into activation vectors with a trained student.

    \b
    Examples:
      python -m pipeline predict volcano "slow cooking" --nearest 5
      python -m pipeline predict --file words.txt --output vectors.npy
    """  # noqa: D301 (click reads the backspace: no line is joined to the next)
    from pipeline.commands.predict import run_predict

    run_predict(options, texts)


@cli.command()
@click.argument("source")
@click.argument("repository")
@options_of(settings.PushOptions)
def push(options: settings.PushOptions, source: str, repository: str) -> None:
    """Publish SOURCE, a student folder or a vectors file, as REPOSITORY (owner/name) on the Hugging Face hub.

    Log in first: hf auth login, or set HF_TOKEN. Students load from there again: Student.load("hf://owner/name").
    """
    from pipeline.commands.push import run_push

    run_push(options, Path(source), repository)


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
        _exit(f"error: {error}", 2)
    except WorkError as error:
        _exit(f"error: {error}", 1)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "python -m pipeline"
        _exit(f"error: {error.format_message()} (see {command} --help)", 2)
    except (KeyboardInterrupt, click.Abort):
        interrupts.exit_interrupted()


def _exit(line: str, code: int) -> None:
    click.echo(" ".join(line.split()), err=True)
    sys.exit(code)
