"""The report command: a page, tables and pictures from a results file, and predictions for larger cells."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.analysis import scaling
from pipeline.analysis.results import Section, sections
from pipeline.analysis.rows import cell_of
from pipeline.commands import display
from pipeline.commands.find_sweep import load_sweep, vectors_for
from pipeline.commands.page import html_page, markdown_page, page_section, page_title
from pipeline.commands.sweep_display import show_results
from pipeline.data.dataset import Dataset
from pipeline.errors import InputError
from pipeline.settings import ReportOptions
from pipeline.storage import output_folder, write_atomically
from pipeline.student.student import Student
from pipeline.sweep.cells import prepare
from pipeline.sweep.cost import number_of_parameters
from pipeline.sweep.grid import read_grid


def run_report(options: ReportOptions) -> None:
    """Draw the tables and plots of a sweep, or write down what its scaling law predicts, and print where they are."""
    stem, results, students = load_sweep(options.results, options.sweep_id)
    data = Dataset(vectors_for(results["grid"], options.vectors, results.get("vectors")))
    with output_folder(options.output) as output:
        if options.predict is not None:
            display.lines(*_predict_sections(results, options.predict, data, output))
            return
        written = write_report(results, stem, output, students, data)
    show_results(results, written[1])
    display.lines(*map(str, written))


def _predict_sections(results: dict[str, Any], most: int, data: Dataset, output: Path) -> list[str]:
    """Predict the larger cells of each section that has cells for a law; lines that name them and the files."""
    lines: list[str] = []
    errors: list[InputError] = []
    for section in sections(results):
        try:
            lines += _predict_section(section, most, data, output)
        except InputError as error:
            errors.append(error)
    if not lines:
        raise errors[0]
    return lines


def _predict_section(section: Section, most: int, data: Dataset, output: Path) -> list[str]:
    results = section.results
    cells = scaling.largest_family([row for row in results["cells"] if row["concepts"] <= most])
    if not cells:
        raise InputError(f"--predict {most}: too few cells with at most so many concepts for a scaling law")
    shared = scaling.shared_by(cells[0])
    trained = {cell_of(row): row for row in results["cells"]}
    known = dict(trained)
    with contextlib.suppress(InputError):  # not a grid of the program: only the trained cells are known
        seeds = len({row["seed"] for row in cells})
        for cell in prepare(read_grid(results["grid"], cells[0]["epochs"], seeds).cells, data):
            row = vars(cell) | {"name": data.omit_default(cell).name, "parameters": number_of_parameters(cell, data)}
            known.setdefault(cell, row)
    predictions = scaling.predict(cells, [row for row in known.values() if scaling.shared_by(row) == shared], most)
    if not predictions["cells"]:
        raise InputError(f"--predict {most}: the grid {results['grid']} has no larger cells")
    predictions |= {
        "grid": results["grid"],
        "vectors_sha256": results["vectors_sha256"],
        "time": f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}",
        "before_training": not any(cell_of(cell) in trained for cell in predictions["cells"]),
    }
    path = output / f"{results['grid']}_predictions{section.suffix}_{predictions['time']}.json"
    _write(path, json.dumps(predictions, indent=1).encode())
    line = "{name}: {cosine:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
    return [*(line.format_map(cell) for cell in predictions["cells"]), str(path)]


def write_report(
    results: dict[str, Any], stem: str, output: Path, students: Sequence[Student], data: Dataset
) -> list[Path]:
    """Write the page, the table and the pictures as ``<output>/<stem>_<name>``.

    Args:
        results: the content of a results file.
        stem: beginning of every file name.
        output: folder.
        students: of each section's best cell.
        data: the vectors that they were trained on.

    Returns:
        The files written, the page first.

    Raises:
        InputError: other vectors than those of the sweep.
    """
    if data.vectors.sha256 != results["vectors_sha256"]:
        raise InputError("the vectors file is not the one that the sweep was trained on; name that with --vectors")
    predictions = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(output.glob(f"{results['grid']}_predictions_*.json"))
    }
    parts = sections(results)
    shown = [page_section(*pair, data, predictions) for pair in zip(parts, students, strict=True)]
    title = page_title(results)
    files = {"_report.html": html_page(title, shown).encode(), "_table.md": markdown_page(title, shown).encode()}
    for part, page in zip(parts, shown, strict=True):
        files |= {f"{part.suffix}_{name}.png": content for name, content in page.pictures.items()}
    for name, content in files.items():
        _write(output / f"{stem}{name}", content)
    return [output / f"{stem}{name}" for name in files]


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda part: part.write_bytes(content))
