"""Figures of the audit of a vectors file."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # batch jobs have no screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from pipeline.extraction.audit import Floats


def norms(values: Floats, layers: Sequence[int]) -> Figure:
    """Distribution of vector norms ``[concepts, templates, layers]`` at each block, outliers as points."""
    figure, axes = plt.subplots(figsize=(max(4.5, min(16, 0.5 * len(layers) + 3)), 4.5), layout="constrained")
    by_layer = values.reshape(-1, len(layers))
    axes.boxplot(by_layer, tick_labels=[str(layer) for layer in layers], whis=(1, 99), flierprops={"markersize": 2})
    axes.set(yscale="log", xlabel="block", ylabel="norm of the activation vector")
    axes.set_title("Norms (box: quartiles; 1 to 99 %)")
    return figure


def structure(values: Floats, layers: Sequence[int], categories: Sequence[str]) -> Figure:
    """Mean centred cosine ``[layers, categories, categories]`` between concepts, for at most three blocks."""
    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    size = max(3.5, 0.26 * len(categories) + 1.5)
    whole = (size * len(shown) + 1, size)
    figure, grid = plt.subplots(1, len(shown), figsize=whole, layout="constrained", sharey=True, squeeze=False)
    limit = float(np.abs(values[shown]).max()) or 1.0
    for axes, place in zip(grid[0], shown, strict=True):
        image = axes.imshow(values[place], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(title=f"block {layers[place]}", yticks=range(len(categories)), yticklabels=categories)
        axes.set_xticks(range(len(categories)), categories, rotation=90)
    figure.colorbar(image, ax=grid, label="mean cosine between two concepts (centred)", shrink=0.7)
    return figure
