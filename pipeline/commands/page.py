"""The report of a sweep, as an HTML page and in Markdown: the sentences, pictures and tables of each section."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Environment
from matplotlib.figure import Figure

from pipeline.analysis import plots, scaling, transitions
from pipeline.analysis.rows import Row, baseline_labeller, labeller
from pipeline.analysis.tables import (
    TABLE_NOTE,
    cell_table,
    configuration_table,
    configurations,
    markdown_table,
    mean_of,
    test_cosines,
    verdict,
)
from pipeline.data.dataset import Dataset
from pipeline.metrics import interval
from pipeline.student.student import Student

EXTREMES = 8  # concepts among the best, and among the worst, that the page shows
FIGURE_TITLES = {
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


@dataclass(frozen=True)
class PageTable:
    """A table of the page: its title, the header and rows as text, and what to know about them."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


@dataclass(frozen=True)
class PageSection:
    """One section of the page.

    Attributes:
        title: what sets the section apart from others; empty for a single one.
        verdict: how the best cell compares with the baselines.
        findings: sentences.
        pictures: PNG files by their name, one of `FIGURE_TITLES`.
        tables: the configurations, the best and worst test concepts, and the cells.
    """

    title: str
    verdict: str
    findings: list[str]
    pictures: dict[str, bytes]
    tables: list[PageTable]


def page_section(
    title: str,
    results: dict[str, Any],
    student: Student,
    data: Dataset,
    teacher: tuple[int, float, float],
    predictions: dict[str, dict[str, Any]],
) -> PageSection:
    """The pictures, tables and sentences of a section.

    Args:
        title: of the section.
        results: of the section.
        student: of its best cell.
        data: the vectors that it was trained on.
        teacher: as in `plots.pareto`.
        predictions: earlier results of `scaling.predict` for this grid, by the names of their files.

    Returns:
        What `html_page` and `markdown_page` show.
    """
    best, cells, vectors = results["best"], results["cells"], data.vectors
    test = data.rows("test", student.config["cell"]["split"])
    names, categories = ([values[row] for row in test] for values in (vectors.concepts, vectors.categories))
    truth = vectors.vectors[test, 0, vectors.layer_index(best["layer"])].astype(np.float32) - student.mean
    predicted = student.encode(names) - student.mean
    figures: dict[str, Figure] = {}
    findings = []
    if family := scaling.largest_family(cells):
        law = scaling.law_of(family)
        findings.append(scaling.describe(law))
    findings += [line for name, made in predictions.items() if (line := scaling.describe_check(name, made, results))]
    if long := [row for row in cells if row["evaluations"] == "log"]:
        findings.append(transitions.describe(long))
        figures["transition"] = plots.transitions(long)
    if len({row["concepts"] for row in cells}) > 1:
        figures |= {"scaling": plots.scaling(cells, results["baselines"]), "heatmap": plots.heat_map(cells)}
    else:
        figures["ranking"] = plots.ranking(_ranked(results), best["concepts"])
    described = (
        f"{best['name']} on {len(test)} test concepts, {results['teacher']} block {best['layer']}, "
        f"test cosine {best['test_cosine']:.3f}"
    )
    figures["curves"] = plots.curves(cells)
    figures["alignment"] = plots.alignment(truth, predicted, categories, described)
    figures["pareto"] = plots.pareto(cells, teacher)
    by_category = {row["name"]: row["test_cosine_by_category"] for row in _best_of_kinds(cells)}
    figures["categories"] = plots.categories(by_category)
    if family:
        figures["law"] = plots.fitted(family, law)
    neighbours = (
        ["concept", "category", "cosine", "true vectors nearest to the answer"],
        _neighbours(names, categories, truth, predicted),
    )
    tables = [
        PageTable("Configurations", *configuration_table(results), TABLE_NOTE),
        PageTable("Best and worst test concepts", *neighbours, f"As {best['name']} answers them."),
        PageTable("Cells", *cell_table(results), "Cosines are centred on the mean training vector, except raw ones."),
    ]
    pictures = {name: _png(figure) for name, figure in figures.items()}
    return PageSection(title[:1].upper() + title[1:], verdict(results), findings, pictures, tables)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    plt.close(figure)
    return content.getvalue()


def _ranked(results: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Name, test cosine and the ends of its interval, of each configuration and each baseline, the best first."""
    cell_label, baseline_label = labeller(results["cells"]), baseline_labeller(results["baselines"])
    ranked = []
    for rows in configurations(results):
        name = cell_label(rows[0]) if "name" in rows[0] else f"({baseline_label(rows[0])})"
        ranked.append((name, mean_of(rows, "test_cosine"), *interval(test_cosines(rows))))
    return ranked


def _best_of_kinds(cells: Sequence[Row]) -> list[Row]:
    """The best row by validation of each kind of student, the best of all first."""
    found: dict[str, Row] = {}
    for row in sorted(cells, key=lambda row: -row["val_cosine"]):
        found.setdefault(row["student"], row)
    return list(found.values())


def _neighbours(
    names: Sequence[str], categories: Sequence[str], truth: plots.Floats, predicted: plots.Floats
) -> list[list[str]]:
    """The test concepts with the best and the worst predictions, and the true vectors nearest to these."""
    units = [F.normalize(torch.from_numpy(values)) for values in (predicted, truth)]
    similarity = (units[0] @ units[1].mT).numpy()  # [N, N]
    own = similarity.diagonal()
    order = list(np.argsort(-own))
    shown = [*order[:EXTREMES], *order[EXTREMES:][-EXTREMES:]]
    return [
        [names[row], categories[row], f"{own[row]:.3f}", ", ".join(names[place] for place in nearest)]
        for row, nearest in zip(shown, np.argsort(-similarity[shown])[:, :3], strict=True)
    ]


def page_title(results: dict[str, Any]) -> str:
    """The title of a sweep's report."""
    block = "" if results["layer"] is None else f", block {results['layer']}"
    return f"Sweep {results['grid']}: {results['teacher']}{block}"


def html_page(title: str, sections: Sequence[PageSection]) -> str:
    """The report as an HTML page that holds its pictures."""
    environment = Environment(autoescape=True)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, sections=sections, titles=FIGURE_TITLES)


def markdown_page(title: str, sections: Sequence[PageSection]) -> str:
    """The tables and the findings of each section in Markdown."""
    lines = [f"# {title}", ""]
    for section in sections:
        if section.title:
            lines += [f"## {section.title}", ""]
        for paragraph in (section.verdict, *section.findings):
            lines += [paragraph, ""]
        lines += [f"{TABLE_NOTE} Cosines are centred on the mean training vector, except `_raw`.", ""]
        lines += [markdown_table(table.head, table.rows) for table in (section.tables[0], section.tables[-1])]
    return "\n".join(lines)
