"""Figures of sweeps: pure functions from results to matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # batch jobs have no screen

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from pipeline.analysis.rows import Row, baseline_labeller, grouped, labeller
from pipeline.analysis.scaling import Law
from pipeline.analysis.transitions import detect

COLOURS = plt.get_cmap("viridis")
COLUMNS = 4  # of panels beside each other
MOST_STUDENTS = 24  # that one figure tells apart
MOST_TICKS = 16  # numbers of concepts on an axis
Floats = NDArray[np.floating[Any]]
BASELINE_STYLES = {"mean": ("darkgrey", "-."), "nearest": ("dimgrey", ":"), "ridge": ("black", "--")}


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, NDArray[Any]]:
    """A figure and its panels ``[rows, columns]``, with grid lines."""
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    return figure, panels


def _colours(cells: list[Row], label: Callable[[Row], str]) -> dict[str, Any]:
    """A colour for each label, the same for all depths; shades of one scale where labels differ in size only."""
    kinds = grouped(cells, lambda row: label({**row, "layers": 0}))
    palette = plt.get_cmap("tab10" if len(kinds) <= 10 else "tab20")
    colours = {kind: palette(place % palette.N) for place, kind in enumerate(kinds)}
    if len({label({**row, "layers": 0, "hidden_dim": 0}) for row in cells}) == 1:
        colours = _shades(kinds)
    return {label(row): colours[kind] for kind, rows in kinds.items() for row in rows}


def _leading(cells: list[Row]) -> tuple[list[Row], str]:
    """The cells of the `MOST_STUDENTS` best students by validation, and a note for a title where there are more."""
    label, best = labeller(cells), dict[str, float]()
    for row in cells:
        best[label(row)] = max(row["val_cosine"], best.get(label(row), -np.inf))
    if len(best) <= MOST_STUDENTS:
        return cells, ""
    shown = set(sorted(best, key=lambda name: -best[name])[:MOST_STUDENTS])
    return [row for row in cells if label(row) in shown], f"; the best {MOST_STUDENTS} of {len(best)} by validation"


def _spread(values: Collection[Any], most: int) -> list[Any]:
    """At most so many of some numbers, evenly spaced in their order, the least and the largest among them."""
    ordered = sorted(set(values))
    places = np.linspace(0, len(ordered) - 1, most).astype(int).tolist()
    return [ordered[place] for place in dict.fromkeys(places)] if ordered else []


def _shades(names: Collection[Any]) -> dict[Any, Any]:
    """A colour for each name, from one scale."""
    return {name: COLOURS(0.9 * place / max(1, len(names) - 1)) for place, name in enumerate(names)}


def _legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Draw a legend under the panels in as many columns as fit; beyond two rows the figure grows."""
    column = 0.6 + 0.058 * max(map(len, names))  # inches
    columns = max(1, int(figure.get_figwidth() / column))
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, rows - 2))
    figure.legend(handles, names, loc="outside lower center", ncols=-(-len(names) // rows), fontsize=8)


def ranking(rows: list[tuple[str, float, float, float]], concepts: int) -> Figure:
    """Test cosines from (name, value, low, high), the best at the top; baselines, in parentheses, are grey."""
    figure, [[axes]] = _panels(1, 1, (9, 1.2 + 0.27 * len(rows)))
    rows = rows[::-1]
    for place, (name, value, low, high) in enumerate(rows):
        colour = "grey" if name.startswith("(") else "C0"
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(value, place, "o", color=colour, markersize=5)
        axes.annotate(f"{value:.3f}", (high, place), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.set(xlabel=f"test cosine (centred), {concepts} training concepts; 95 % intervals")
    axes.margins(x=0.08, y=0.02)
    return figure


def scaling(cells: list[Row], baselines: list[Row]) -> Figure:
    """Test cosine against the number of training concepts, one line per kind of student; seeds as a band."""
    figure, [[axes]] = _panels(1, 1, (8, 5.2))
    cells, note = _leading(cells)
    label = labeller(cells)
    colours = _colours(cells, label)
    for name, rows in grouped(cells, label).items():
        points = pd.DataFrame(rows).groupby("concepts")["test_cosine"].agg(["mean", "min", "max"])
        axes.plot(points.index, points["mean"], label=name, color=colours[name], **_style(rows[0], cells))
        axes.fill_between(points.index, points["min"], points["max"], color=colours[name], alpha=0.2, linewidth=0)
    for kind, (colour, style) in BASELINE_STYLES.items():
        own = [row for row in baselines if row["student"] == kind]
        for place, (name, rows) in enumerate(grouped(own, baseline_labeller(baselines)).items()):
            x, y = zip(*sorted((row["concepts"], row["test_cosine"]) for row in rows), strict=True)
            look = {"marker": "sov^Dp*X"[place % 8], "markersize": 4, "color": colour}
            axes.plot(x, y, style, label=f"{name} (baseline)", **look)
    _concepts_axis(axes, cells)
    bands = " (bands: all seeds)" if len({row["seed"] for row in cells}) > 1 else ""
    axes.set(ylabel="test cosine (centred)", title=f"Fidelity on held-out concepts{bands}{note}")
    _legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _concepts_axis(axes: Axes, cells: list[Row]) -> None:
    """Make the x axis one of training concepts, logarithmic, with a tick at each number of them."""
    numbers = _spread([row["concepts"] for row in cells], MOST_TICKS)
    axes.set(xscale="log", xlabel="training concepts (log scale)")
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.xaxis.set_minor_locator(NullLocator())


def _style(row: Row, cells: list[Row]) -> dict[str, Any]:
    """Line and marker by depth, which distinguish lines that nearly coincide."""
    place = sorted({cell["layers"] for cell in cells}).index(row["layers"])
    return {"linestyle": ("-", "--", ":", "-.")[place % 4], "marker": "osd^"[place % 4], "markersize": 5}


def heat_map(cells: list[Row]) -> Figure:
    """Mean test cosine of every kind of student (rows) and number of training concepts (columns)."""
    cells, note = _leading(cells)
    drawn = _spread([row["concepts"] for row in cells], MOST_TICKS)
    cells = [row for row in cells if row["concepts"] in drawn]
    frame = pd.DataFrame(cells).assign(kind=list(map(labeller(cells), cells)))
    table = frame.pivot_table("test_cosine", "kind", "concepts", sort=False).sort_index(axis=1)
    kinds, numbers, grid = list(table.index), list(table.columns), table.to_numpy()
    width = 2.4 + 0.09 * max(map(len, kinds)) + 0.9 * len(numbers)
    figure, axes = plt.subplots(figsize=(width, 1.4 + 0.36 * len(kinds)), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = value < (np.nanmin(grid) + np.nanmax(grid)) / 2
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(numbers)), [str(n) for n in numbers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="training concepts", title=f"Test cosine{note}")
    figure.colorbar(image, ax=axes, label="test cosine (centred)")
    return figure


def curves(cells: list[Row]) -> Figure:
    """Training loss and validation cosine by epoch, at most `COLUMNS` panels, one per number of training concepts."""
    cells, note = _leading([row for row in cells if len(row["curves"].get("val_cosine", [])) > 1])
    drawn = _spread([row["concepts"] for row in cells], COLUMNS)
    columns = grouped([row for row in cells if row["concepts"] in drawn], lambda row: row["concepts"])
    label = labeller(cells)
    colours = _colours(cells, label)
    size = max(9.0, 3.4 * len(columns)), 6.8
    figure, panels = _panels(2, max(1, len(columns)), size, sharex=True, sharey="row")
    for place, number in enumerate(sorted(columns)):
        for name, rows in grouped(columns[number], label).items():
            style = {"color": colours[name], "linewidth": 1.2, "linestyle": _style(rows[0], cells)["linestyle"]}
            for row in rows:
                shown = row["curves"]
                panels[0, place].plot(shown["epoch"], shown["val_cosine"], label=name * (row is rows[0]), **style)
                panels[1, place].plot(shown["epoch"], shown["train_loss"], **style)
        panels[0, place].set_title(f"{number} training concepts")
        panels[1, place].set_xlabel("epoch")
    panels[0, 0].set_ylabel("validation cosine (centred)")
    panels[1, 0].set_ylabel("training loss")
    if cells:
        figure.suptitle(f"Training curves{note}" * bool(note))
        pairs = [pair for panel in panels[0] for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
        lines = {name: line for line, name in pairs}  # each student once
        _legend_below(figure, list(lines.values()), list(lines))
    return figure


def alignment(truth: Floats, predicted: Floats, categories: Sequence[str], title: str) -> Figure:
    """True and predicted centred vectors ``[N, d_model]`` by category, in PCA (axes of the true ones) and t-SNE."""
    from sklearn.decomposition import PCA  # here, since it takes as long to load as the rest of this module
    from sklearn.manifold import TSNE

    pca = PCA(2, random_state=0).fit(truth)
    both = np.concatenate([truth, predicted])
    # PCA first, as van der Maaten and Hinton (2008) do: it removes noise and most of the cost.
    reduced = PCA(min(50, *both.shape), random_state=0).fit_transform(both)
    perplexity = min(30.0, (len(both) - 1) / 3)
    maps = TSNE(2, init="pca", perplexity=perplexity, metric="cosine", random_state=0).fit_transform(reduced)
    share = 100 * pca.explained_variance_ratio_
    shown = {
        "PCA, true vectors": pca.transform(truth),
        "PCA, predicted vectors": pca.transform(predicted),
        "t-SNE, true vectors": maps[: len(truth)],
        "t-SNE, predicted vectors": maps[len(truth) :],
    }
    figure, panels = _panels(2, 2, (12, 9.5), sharex="row", sharey="row")
    palette = plt.get_cmap("tab20")
    for panel, (name, points) in zip(panels.flat, shown.items(), strict=True):
        for place, category in enumerate(sorted(set(categories))):
            x, y = points[np.array(categories) == category].T
            style = {"color": palette(place % 20), "marker": "os^"[place % 3]}
            panel.scatter(x, y, s=28, label=category, alpha=0.85, **style)
        is_pca = name.startswith("PCA")
        x, y = (f"component {i + 1} ({share[i]:.0f} % of variance)" if is_pca else f"t-SNE {i + 1}" for i in (0, 1))
        panel.set(title=name, xlabel=x, ylabel=y)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
    figure.suptitle(title)
    return figure


def pareto(cells: list[Row], teacher: tuple[int, float, float]) -> Figure:
    """Test cosine against parameters and against operations of a prediction, for the largest training set.

    Both count the early blocks of the teacher that a truncated student runs. The line joins the students that no
    other beats at less cost.

    Args:
        cells: rows with ``flops``; seeds are drawn as their mean.
        teacher: blocks, parameters and operations up to the block to be reproduced; drawn at cosine 1.

    Returns:
        The figure.
    """
    blocks, weights, operations = teacher
    most = max(row["concepts"] for row in cells)
    shown, note = _leading([row for row in cells if row["concepts"] == most])
    named = set(map(labeller(cells), shown))
    kinds = grouped([row for row in cells if row["concepts"] == most], labeller(cells))
    found = []  # cosine, parameters and operations of each student, and its name
    for name, [row, *others] in kinds.items():
        early = row["blocks"] * (row["student"] == "truncated") * weights / max(1, blocks)
        cosine = np.mean([one["test_cosine"] for one in (row, *others)])
        found.append((cosine, row["parameters"] + early, row["flops"], name))
    found.sort(key=lambda student: -student[0])
    figure, [panels] = _panels(1, 2, (12, 6.5), sharey=True)
    for axis, of_teacher, what in ((1, weights, "parameters"), (2, operations, "operations of a prediction")):
        panel, best = panels[axis - 1], -np.inf
        front = [(one[axis], best := one[0]) for one in sorted(found, key=lambda one: one[axis]) if one[0] > best]
        panel.plot(*zip(*front, strict=True), color="lightgrey", zorder=0)
        rest = [one for one in found if one[-1] not in named]
        panel.scatter([one[axis] for one in rest], [one[0] for one in rest], color="lightgrey", s=16, zorder=0)
        for place, one in enumerate(one for one in found if one[-1] in named):
            marker, colour = "osD^v"[place // 10 % 5], plt.get_cmap("tab10")(place % 10)
            panel.scatter(one[axis], one[0], color=colour, marker=marker, s=44, label=one[-1])
        panel.scatter(of_teacher, 1.0, marker="*", s=120, color="black", label="teacher, up to the block")
        panel.set(xscale="log", xlabel=f"{what}, early blocks of the teacher included")
    panels[0].set_ylabel(f"test cosine (centred), {most} training concepts")
    if note:
        figure.suptitle(f"In colour{note}")
    _legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure


def fitted(cells: list[Row], law: Law) -> Figure:
    """The scaling law with its cells, and the residuals."""
    figure, [[main, rest]] = _panels(1, 2, (12, 4.8))
    numbers = np.exp(np.linspace(*law.span, 50))
    sizes = sorted({row["parameters"] for row in cells})
    drawn = _spread(sizes, MOST_TICKS)
    for size, colour in _shades(sizes).items():
        own = [(row, residual) for row, residual in zip(cells, law.residuals, strict=True) if row["parameters"] == size]
        if size in drawn:
            main.plot(numbers, [1 - law.cosine(n, size) for n in numbers], color=colour, label=f"{size:,} parameters")
        x = [row["concepts"] for row, _ in own]
        main.scatter(x, [1 - row["test_cosine"] for row, _ in own], color=colour, s=14)
        rest.scatter(x, [100 * residual for _, residual in own], color=colour, s=16)
    main.set(yscale="log", ylabel="1 - test cosine", title="Scaling law")
    main.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    main.yaxis.set_major_formatter("{x:g}")
    main.yaxis.set_minor_locator(NullLocator())
    main.legend(fontsize=7)
    rest.axhline(0, color="grey", linewidth=1)
    rest.set(ylabel="residual of the error (%)", title="Residuals")
    for panel in (main, rest):
        _concepts_axis(panel, cells)
    return figure


def categories(values: dict[str, dict[str, float]]) -> Figure:
    """Test cosine by category, one bar per student, in the order of the first student's values."""
    names = sorted(next(iter(values.values())), key=lambda name: next(iter(values.values()))[name])
    figure, axes = plt.subplots(figsize=(9, 1.5 + (0.16 + 0.06 * len(values)) * len(names)), layout="constrained")
    height = 0.8 / len(values)
    for place, (student, scores) in enumerate(values.items()):
        places = np.arange(len(names)) - place * height  # the first at the top of its category
        axes.barh(places, [scores[name] for name in names], height, label=student)
    axes.set_yticks(np.arange(len(names)) - 0.4 + height / 2, names)
    axes.set(xlabel="test cosine (centred)")
    axes.margins(y=0.01)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    _legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def transitions(cells: list[Row]) -> Figure:
    """Training loss and validation cosine over log epochs, with transitions; one panel per number of concepts."""
    cells, note = _leading(cells)
    drawn = _spread([row["concepts"] for row in cells], COLUMNS)
    columns = grouped([row for row in cells if row["concepts"] in drawn], lambda row: row["concepts"])
    label = labeller(cells)
    colours = _shades(dict.fromkeys(map(label, cells)))
    figure, [panels] = _panels(1, len(columns), (max(6.0, 4.2 * len(columns)), 5.0), sharey=True)
    for panel, (number, rows) in zip(panels, sorted(columns.items()), strict=True):
        for row in rows:
            colour = colours[label(row)]
            epochs, loss, score = (row["curves"][key] for key in ("epoch", "train_loss", "val_cosine"))
            panel.plot(epochs, score, "-", epochs, loss, ":", color=colour)
            found = detect(epochs, loss, score)
            if found.memorised is not None:
                panel.plot(found.memorised, loss[epochs.index(found.memorised)], "|", color=colour, markersize=14)
            if found.late:
                panel.plot(found.steepest, score[epochs.index(found.steepest)], "*", color=colour, markersize=14)
        panel.set(xscale="log", xlabel="epoch", title=f"{number} training concepts")
    panels[0].set_ylabel("validation cosine, training loss")
    styles = {"validation cosine": "-", "training loss": ":", "concepts memorised": "|", "late transition": "*"}
    handles = [Line2D([], [], color=colour) for colour in colours.values()]
    for style in styles.values():
        handles += panels[0].plot([], [], style, color="grey", markersize=12)
    figure.suptitle(f"Long training{note}" * bool(note))
    _legend_below(figure, handles, [*colours, *styles])
    return figure
