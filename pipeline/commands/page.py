"""The report of a sweep, as an HTML page and in Markdown: the sentences, pictures and tables of each section."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from pipeline.analysis import plots, scaling, tables, transitions
from pipeline.analysis.results import Section
from pipeline.analysis.rows import baseline_labeller, grouped, labeller
from pipeline.benchmarks.tables import NOTE, benchmark_table, describe_best
from pipeline.data.dataset import Dataset
from pipeline.metrics import intervals
from pipeline.student.student import Student
from pipeline.sweep.cost import teacher_flops, teacher_parameters

OPEN_ROWS = 60  # of a table that the page shows; further ones are folded
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


class PageTable(NamedTuple):
    """A table of the page: its title, the header and rows as text, what to know about them, and what is folded."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    open_rows: int = OPEN_ROWS  # at the top; a longer table's other rows are folded


class PageSection(NamedTuple):
    """One section of the page."""

    title: str  # what sets the section apart from others; empty for a single one
    sentences: list[str]  # how the best cell compares with the baselines, and findings
    pictures: dict[str, bytes]  # PNG files by their name in `FIGURE_TITLES`
    tables: list[PageTable]  # the configurations, the best and worst test concepts, and the cells


def page_section(
    section: Section, student: Student, data: Dataset, predictions: dict[str, dict[str, Any]]
) -> PageSection:
    """What the pages show of a section, with its best student and earlier results of `scaling.predict` by file name."""
    results, vectors = section.results, data.vectors
    best, cells, block = results["best"], results["cells"], results["layer"]
    test = data.rows("test", student.config["cell"]["split"])
    names, categories = ([values[row] for row in test] for values in (vectors.concepts, vectors.categories))
    truth = vectors.vectors[test, 0, vectors.layer_index(block)].astype(np.float32) - student.mean
    predicted = student.encode(names) - student.mean
    figures: dict[str, Figure] = {}
    sentences = [tables.verdict(results)]
    if family := scaling.largest_family(cells):
        law = scaling.law_of(family)
        sentences.append(scaling.describe(law))
    sentences += [line for name, made in predictions.items() if (line := scaling.describe_check(name, made, results))]
    if long := [row for row in cells if row["evaluations"] == "log"]:
        sentences.append(transitions.describe(long))
        figures["transition"] = plots.transitions(long)
    if len({row["concepts"] for row in cells}) > 1:
        figures |= {"scaling": plots.scaling(cells, results["baselines"]), "heatmap": plots.heat_map(cells)}
    else:
        figures["ranking"] = plots.ranking(_ranked(results), best["concepts"])
    place = f"{best['name']} on {len(test)} test concepts, {results['teacher']} block {block}"
    title = f"{place}, test cosine {best['test_cosine']:.3f}"
    figures["curves"] = plots.curves(cells)
    figures["alignment"] = plots.alignment(truth, predicted, categories, title)
    figures["pareto"] = plots.pareto(cells, (block, teacher_parameters(block, data), teacher_flops(block, data)))
    ranked = sorted(cells, key=lambda row: -row["val_cosine"])
    best_of_kinds = [rows[0] for rows in grouped(ranked, lambda row: row["student"]).values()]
    figures["categories"] = plots.categories({row["name"]: row["test_cosine_by_category"] for row in best_of_kinds})
    if family:
        figures["law"] = plots.fitted(family, law)
    head = ["concept", "category", "cosine", "true vectors nearest to the answer"]
    neighbours = _neighbours(names, categories, truth, predicted)
    note = "Cosines are centred on the mean training vector, except raw ones."
    table = tables.cell_table(results, tables.all_metrics(results))
    judged = results.get("benchmarks", {"rows": [], "about": []})
    measured = [
        row for row in judged["rows"] if row["layer"] == block and row.get("split", best["split"]) == best["split"]
    ]
    if measured:
        sentences += describe_best(measured, best["name"])
    shown = [
        PageTable("Configurations", *tables.configuration_table(results), tables.TABLE_NOTE),
        *(
            [PageTable("Benchmarks", *benchmark_table(measured), " ".join([NOTE, *judged["about"]]))]
            if measured
            else []
        ),
        PageTable("Best and worst test concepts", head, neighbours, f"As {best['name']} answers them."),
        PageTable("Cells", *table, note, OPEN_ROWS if len(table[1]) <= OPEN_ROWS else 0),  # the worst come first
    ]
    pictures = {name: _png(figure) for name, figure in figures.items()}
    return PageSection(section.title[:1].upper() + section.title[1:], sentences, pictures, shown)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    plt.close(figure)
    return content.getvalue()


def _ranked(results: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Name, test cosine and the ends of its interval, of each configuration and each baseline, the best first."""
    # All baselines, and the best configurations by validation.
    cell_label, baseline_label = labeller(results["cells"]), baseline_labeller(results["baselines"])
    groups = tables.configurations(results)
    ranked = sorted(
        (rows for rows in groups if "name" in rows[0]), key=lambda rows: -tables.mean_of(rows, "val_cosine")
    )
    left_out = {id(rows) for rows in ranked[plots.MOST_STUDENTS :]}
    groups = [rows for rows in groups if id(rows) not in left_out]
    names = [cell_label(rows[0]) if "name" in rows[0] else f"({baseline_label(rows[0])})" for rows in groups]
    means = [tables.mean_of(rows, "test_cosine") for rows in groups]
    ends = intervals(list(map(tables.test_cosines, groups)))
    return [(name, mean, low, high) for name, mean, (low, high) in zip(names, means, ends, strict=True)]


def _neighbours(
    names: Sequence[str], categories: Sequence[str], truth: plots.Floats, predicted: plots.Floats
) -> list[list[str]]:
    """The test concepts with the best and the worst predictions, and the true vectors nearest to these."""
    from sklearn.metrics.pairwise import cosine_similarity  # here, as in `plots.alignment`

    similarity = cosine_similarity(predicted, truth)  # [N, N]
    order = list(np.argsort(-similarity.diagonal()))
    shown = [*order[:EXTREMES], *order[EXTREMES:][-EXTREMES:]]
    return [
        [names[row], categories[row], f"{similarity[row, row]:.3f}", ", ".join(names[place] for place in nearest)]
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
    lines = [f"# {title}\n"]
    for section in sections:
        lines += [f"## {section.title}\n"] if section.title else []
        note = f"{tables.TABLE_NOTE} Cosines are centred on the mean training vector, except `_raw`."
        lines += [f"{paragraph}\n" for paragraph in (*section.sentences, note)]
        shown = [table for table in section.tables if table.title in ("Configurations", "Benchmarks", "Cells")]
        lines += [tables.markdown_table(table.head, table.rows) for table in shown]
    return "\n".join(lines)
