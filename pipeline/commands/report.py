"""The report of a sweep: a table in Markdown, and pictures, from the results file and the best student."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from pipeline.analysis import plots, scaling, transitions
from pipeline.analysis.results import Section, sections
from pipeline.analysis.rows import Row, baseline_labeller, cell_of, labeller
from pipeline.analysis.tables import (
    NOTE,
    configurations,
    markdown_table,
    mean_of,
    summary,
    table_rows,
    test_cosines,
    verdict,
)
from pipeline.commands import display
from pipeline.commands.find_sweep import load_sweep, vectors_for
from pipeline.data.dataset import Dataset
from pipeline.data.vectors import Vectors
from pipeline.errors import InputError
from pipeline.metrics import interval
from pipeline.settings import ReportOptions
from pipeline.storage import output_folder, write_atomically
from pipeline.student.student import Student
from pipeline.sweep.cells import prepare
from pipeline.sweep.cost import number_of_parameters, teacher_flops, teacher_parameters
from pipeline.sweep.grid import read_grid

SHOWN = 8  # best and worst concepts
TITLES = {
    "transition": "Long training",
    "ranking": "Students",
    "scaling": "Fidelity and training concepts",
    "heatmap": "Students and training concepts",
    "curves": "Training curves",
    "alignment": "True and predicted vectors",
    "pareto": "Fidelity and cost",
    "categories": "Categories",
    "law": "Scaling law",
}


def _title(results: dict[str, Any]) -> str:
    block = "" if results["layer"] is None else f", block {results['layer']}"
    return f"Sweep {results['grid']}: {results['teacher']}{block}"


def markdown(results: dict[str, Any], parts: Sequence[tuple[Section, Sequence[str]]]) -> str:
    """The tables and the findings of each section as a Markdown page."""
    lines = [f"# {_title(results)}", ""]
    for section, findings in parts:
        if section.title:
            lines += [f"## {_heading(section)}", ""]
        lines += [verdict(section.results), "", *(line for finding in findings for line in (finding, ""))]
        lines += [f"{NOTE} Cosines are centred on the mean training vector, except `_raw`.", ""]
        lines += [markdown_table(*summary(section.results)), markdown_table(*table_rows(section.results))]
    return "\n".join(lines)


def _heading(section: Section) -> str:
    return section.title[:1].upper() + section.title[1:]


def _neighbours(student: Student, data: Dataset, layer: int) -> list[list[str]]:
    """The test concepts that the student answers best and worst, with the true vectors nearest to its answers."""
    rows, vectors = _test_rows(student, data), data.vectors
    names = [vectors.concepts[row] for row in rows]
    mean = student.mean
    truth = vectors.vectors[rows, 0, vectors.layer_index(layer)].astype(np.float32) - mean
    answers = student.encode(names) - mean
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12) for values in (answers, truth)]
    similarity = unit[0] @ unit[1].T  # [N, N]
    own = similarity.diagonal()
    order = list(np.argsort(-own))
    shown = [*order[:SHOWN], *order[SHOWN:][-SHOWN:]]
    return [
        [names[row], vectors.categories[rows[row]], f"{own[row]:.3f}", ", ".join(names[place] for place in nearest)]
        for row, nearest in zip(shown, np.argsort(-similarity[shown])[:, :3], strict=True)
    ]


def _test_rows(student: Student, data: Dataset) -> list[int]:
    return data.rows("test", student.config["cell"]["split"])


def _law(results: dict[str, Any]) -> tuple[list[str], dict[str, Figure]]:
    """The scaling law of the largest family of cells that descend: a sentence and a picture."""
    cells = scaling.largest_family(results["cells"])
    if not cells:
        return [], {}
    law = scaling.law_of(cells)
    told = [
        f"{name} = {value['value']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
        for name, value in law.values.items()
        if value is not None
    ]
    sentence = f"Scaling law 1 - cosine = E + A N^-alpha + B P^-beta: {', '.join(told)} (90 % bootstrap intervals)."
    return [sentence], {"law": plots.fitted(cells, law)}


def _receipts(results: dict[str, Any], output: Path) -> list[str]:
    """How earlier predictions for cells of this grid fared."""
    told = []
    for path in sorted(output.glob(f"{results['grid']}_predictions_*.json")):
        receipt = json.loads(path.read_text(encoding="utf-8"))
        checked = scaling.check(receipt, results["cells"])
        if checked and receipt["vectors_sha256"] == results["vectors_sha256"]:
            told.append(
                f"Predicted from cells of at most {receipt['most']} concepts ({path.name}): {checked['cells']} larger "
                f"cells, mean error {checked['mean']:.3f}, largest {checked['most']:.3f}; the {receipt['level']:.0%} "
                f"intervals cover {checked['coverage']:.0%}."
            )
    return told


def predict_sections(results: dict[str, Any], most: int, data: Dataset, output: Path) -> list[str]:
    """Write what laws fitted on small cells expect of the larger cells, for each section that has cells for a law.

    Args:
        results: the content of a results file, with or without the larger cells.
        most: concepts of the largest cell that a fit sees.
        data: the vectors.
        output: folder.

    Returns:
        The prediction of each cell as a line, and the files.

    Raises:
        InputError: too few cells for a fit, or no larger ones, in every section.
    """
    lines: list[str] = []
    wrong: list[InputError] = []
    for section in sections(results):
        try:
            path, told = write_predictions(section, most, data, output)
        except InputError as error:
            wrong.append(error)
            continue
        lines += [*told, str(path)]
    if not lines:
        raise wrong[0]
    return lines


def write_predictions(section: Section, most: int, data: Dataset, output: Path) -> tuple[Path, list[str]]:
    """Write what a law fitted on small cells expects of the larger cells of the grid, before these are looked at.

    Args:
        section: of a sweep, with or without the larger cells.
        most: concepts of the largest cell that the fit sees.
        data: the vectors.
        output: folder.

    Returns:
        The file, and the prediction of each cell as a line.

    Raises:
        InputError: too few cells for a fit, or no larger ones.
    """
    results = section.results
    cells = scaling.largest_family([row for row in results["cells"] if row["concepts"] <= most])
    if not cells:
        raise InputError(f"--predict {most}: too few cells with at most so many concepts for a scaling law")
    shared = scaling.shared_by(cells[0])
    known = {cell_of(row): row for row in results["cells"]}
    with contextlib.suppress(InputError):  # a grid that is not ours by name; then only what was trained is known
        seeds = len({row["seed"] for row in cells})
        for cell in prepare(read_grid(results["grid"], cells[0]["epochs"], seeds).cells, data):
            row = vars(cell) | {"name": data.as_named(cell).name, "parameters": number_of_parameters(cell, data)}
            known.setdefault(cell, row)
    receipt = scaling.predict(cells, [row for row in known.values() if scaling.shared_by(row) == shared], most)
    if not receipt["cells"]:
        raise InputError(f"--predict {most}: the grid {results['grid']} has no larger cells")
    trained = {cell_of(row) for row in results["cells"]}
    receipt |= {
        "grid": results["grid"],
        "vectors_sha256": results["vectors_sha256"],
        "time": f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}",
        "before_training": not any(cell_of(cell) in trained for cell in receipt["cells"]),
    }
    path = output / f"{results['grid']}_predictions{section.suffix}_{receipt['time']}.json"
    write_atomically(path, lambda part: part.write_text(json.dumps(receipt, indent=1), encoding="utf-8"))
    lines = [
        f"{cell['name']}: {cell['cosine']:.3f} ({cell['interval'][0]:.3f} to {cell['interval'][1]:.3f})"
        for cell in receipt["cells"]
    ]
    return path, lines


def write_report(
    results: dict[str, Any], stem: str, output: Path, students: Sequence[Student], vectors: Vectors
) -> list[Path]:
    """Write the page, the table and the pictures as ``<output>/<stem>_<what>``.

    Args:
        results: the content of a results file.
        stem: beginning of every file name.
        output: folder.
        students: of each section's best cell.
        vectors: the file that they were trained on.

    Returns:
        The files written, the page first.

    Raises:
        InputError: the vectors are others than those of the sweep, or the folder cannot be written.
    """
    if vectors.sha256 != results["vectors_sha256"]:
        raise InputError("the vectors file is not the one that the sweep was trained on; name that with --vectors")
    data = Dataset(vectors)
    written, parts, shown = [], [], []
    for section, student in zip(sections(results), students, strict=True):
        findings, figures = _findings(section.results, student, data, output)
        pictures = []
        for name, figure in figures.items():
            path = output / f"{stem}{section.suffix}_{name}.png"
            write_atomically(path, lambda part, figure=figure: figure.savefig(part, dpi=130, format="png"))  # type: ignore[misc]
            plt.close(figure)
            written.append(path)
            pictures.append({"title": TITLES[name], "data": base64.b64encode(path.read_bytes()).decode()})
        parts.append((section, findings))
        shown.append(_shown(section, findings, pictures, _neighbours(student, data, section.results["layer"])))
    table = output / f"{stem}_table.md"
    write_atomically(table, lambda part: part.write_text(markdown(results, parts), encoding="utf-8"))
    page = output / f"{stem}_report.html"
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    text = Environment(autoescape=True).from_string(template).render(title=_title(results), sections=shown)
    write_atomically(page, lambda part: part.write_text(text, encoding="utf-8"))
    return [page, table, *written]


def _findings(
    results: dict[str, Any], student: Student, data: Dataset, output: Path
) -> tuple[list[str], dict[str, Figure]]:
    """Sentences and pictures of one section, whose best cell's student is given."""
    findings, law = _law(results)
    findings += _receipts(results, output)
    figures = _figures(results, student, data) | law
    if long := [row for row in results["cells"] if row["evaluations"] == "log"]:
        findings.append(transitions.describe(long))
        figures = {"transition": plots.transitions(long)} | figures
    return findings, figures


def _shown(
    section: Section, findings: list[str], pictures: list[dict[str, str]], neighbours: list[list[str]]
) -> dict[str, Any]:
    """A section as the page shows it."""
    results = section.results

    def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> dict[str, Any]:
        return {"title": title, "head": head, "rows": rows, "note": note}

    tables = [
        table("Configurations", *summary(results), NOTE),
        table(
            "Best and worst test concepts",
            ["concept", "category", "cosine", "true vectors nearest to the answer"],
            neighbours,
            f"As {results['best']['name']} answers them.",
        ),
        table("Cells", *table_rows(results), "Cosines are centred on the mean training vector, except raw ones."),
    ]
    return {
        "title": _heading(section),
        "verdict": verdict(results),
        "findings": findings,
        "pictures": pictures,
        "tables": tables,
    }


def _overview(results: dict[str, Any]) -> dict[str, Figure]:
    """All students at a glance: over the numbers of training concepts, or ranked where there is only one."""
    cells = results["cells"]
    if len({row["concepts"] for row in cells}) > 1:
        return {"scaling": plots.scaling(cells, results["baselines"]), "heatmap": plots.heat_map(cells)}
    name_of, baseline_name_of = labeller(cells), baseline_labeller(results["baselines"])
    ranked = []
    for own in configurations(results):
        name = name_of(own[0]) if "name" in own[0] else f"({baseline_name_of(own[0])})"
        ranked.append((name, mean_of(own, "test_cosine"), *interval(test_cosines(own))))
    return {"ranking": plots.ranking(ranked, cells[0]["concepts"])}


def _best_of_kinds(cells: Sequence[Row]) -> list[Row]:
    """Of each kind of student the best by validation, the best of all first."""
    found: dict[str, Row] = {}
    for row in sorted(cells, key=lambda row: -row["val_cosine"]):
        found.setdefault(row["student"], row)
    return list(found.values())


def _figures(results: dict[str, Any], student: Student, data: Dataset) -> dict[str, Figure]:
    best, cells, vectors = results["best"], results["cells"], data.vectors
    rows = _test_rows(student, data)
    truth = vectors.vectors[rows, 0, vectors.layer_index(best["layer"])].astype(np.float32)
    predicted = student.encode([vectors.concepts[row] for row in rows])
    mean, block = student.mean, best["layer"]
    teacher = (block, teacher_parameters(block, data), teacher_flops(block, data))
    overview = _overview(results)
    return overview | {
        "curves": plots.curves(cells),
        "alignment": plots.alignment(
            truth - mean,
            predicted - mean,
            [vectors.categories[row] for row in rows],
            f"{best['name']} on {len(rows)} test concepts, {results['teacher']} block {best['layer']}, "
            f"test cosine {best['test_cosine']:.3f}",
        ),
        "pareto": plots.pareto(cells, teacher),
        "categories": plots.categories({row["name"]: row["test_cosine_by_category"] for row in _best_of_kinds(cells)}),
    }


def run_report(options: ReportOptions) -> None:
    """Draw the tables and plots of a sweep, or write down what its scaling law predicts, and print where they are."""
    stem, results, students = load_sweep(options.results, options.sweep_id)
    vectors = vectors_for(results["grid"], options.vectors, results.get("vectors"))
    with output_folder(options.output) as output:
        if options.predict is not None:
            display.lines(*predict_sections(results, options.predict, Dataset(vectors), output))
            return
        written = write_report(results, stem, output, students, vectors)
    display.results(results)
    display.lines(*map(str, written))
