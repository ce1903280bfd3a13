"""Audit of a vectors file: norms, outliers, vectors in the attention sink, agreement of templates, categories.

Transformers park attention on the first position, whose residual stream then carries massive activations (Xiao et al.
2023, "Efficient streaming language models with attention sinks"; Sun et al. 2024, "Massive activations in large
language models"). A vector read there says little about its concept, and one vector of a hundredfold norm dominates
means and losses.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pipeline.extraction.request import Request

OUTLIER = 10.0  # times the median norm of the layer
CATEGORIES = 40  # the largest ones, as many as a heat map shows
CHUNK_ROWS = 1024

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Audit:
    """Properties of the vectors of a file.

    The agreement of templates is for each layer the mean cosine between a concept's centred vectors under two of them:
    a ceiling for a student that knows the concept alone.
    """

    layers: tuple[int, ...]
    norms: Floats  # [concepts, templates, layers]
    outliers: list[tuple[str, int, int, float]]  # concept, template, block, times the block's median; largest first
    in_sink: list[str]  # concepts whose vector was read at position 0 of a prompt
    agreement: list[float]  # [layers], empty for one template
    categories: list[str]  # the largest
    structure: Floats  # [layers, categories, categories] mean cosine between centred vectors of two concepts

    def manifest(self) -> dict[str, Any]:
        """The audit as plain values, without the structure of categories."""
        by_layer = np.moveaxis(self.norms, -1, 0).reshape(len(self.layers), -1)
        return {
            "norms": {
                str(layer): {"median": float(np.median(norms)), "max": float(norms.max())}
                for layer, norms in zip(self.layers, by_layer, strict=True)
            },
            "norm_outliers": [
                {"concept": concept, "template": template, "layer": layer, "times_median": round(times, 1)}
                for concept, template, layer, times in self.outliers
            ],
            "read_at_position_0": self.in_sink,
            "template_agreement": dict(zip(map(str, self.layers), self.agreement, strict=False)),
        }

    def metrics(self) -> dict[str, float]:
        """The audit as MLflow metrics."""
        manifest = self.manifest()
        values = {f"norm_median_layer_{layer}": norms["median"] for layer, norms in manifest["norms"].items()}
        agreement = manifest["template_agreement"]
        values |= {f"template_agreement_layer_{layer}": value for layer, value in agreement.items()}
        return values | {"norm_outliers": len(self.outliers), "read_at_position_0": len(self.in_sink)}

    def warnings(self) -> list[str]:
        """One line for each property that may harm students trained on the file."""
        lines = []
        if self.in_sink:
            lines.append(
                f"{len(self.in_sink)} concepts are read at position 0, the attention sink ({_few(self.in_sink)}); "
                "put text before {concept} in the template"
            )
        if names := list(dict.fromkeys(concept for concept, *_ in self.outliers)):
            lines.append(f"{len(names)} concepts have vectors of over {OUTLIER:g} x the median norm: {_few(names)}")
        return lines


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def audit(path: Path, request: Request, in_sink: list[str]) -> Audit:
    """Audit a vectors file, a few rows at a time; ``in_sink`` are the concepts that were read at position 0."""
    norms = np.concatenate([np.linalg.norm(chunk, axis=-1) for _, chunk in _chunks(path)])
    rows = len(norms)
    mean = sum(chunk.sum(0) for _, chunk in _chunks(path)) / rows  # [templates, layers, d_model]
    sizes = Counter(request.categories).most_common(CATEGORIES)
    categories = sorted(category for category, _ in sizes)
    place = {category: number for number, category in enumerate(categories)}
    sums = np.zeros((len(request.layers), len(categories), mean.shape[-1]))  # of unit vectors under the first template
    agreement = np.zeros(len(request.layers))
    pairs = list(itertools.combinations(range(len(request.templates)), 2))
    for start, chunk in _chunks(path):
        centred = chunk - mean
        unit = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)
        agreement += sum(((unit[:, a] * unit[:, b]).sum((0, -1)) for a, b in pairs), np.zeros_like(agreement))
        for row, vectors in enumerate(unit[:, 0], start):
            if (number := place.get(request.categories[row])) is not None:
                sums[:, number] += vectors
    count = np.array([dict(sizes)[category] for category in categories], float)
    structure = sums @ sums.swapaxes(1, 2)  # [layers, categories, categories] sums over pairs of concepts
    within = np.arange(len(categories))
    structure[:, within, within] -= count  # a concept with itself is no pair
    ordered = np.outer(count, count)
    ordered[within, within] = np.maximum(count * (count - 1), 1)
    times = norms / np.median(norms, axis=(0, 1))
    found = sorted(zip(*np.nonzero(times > OUTLIER), strict=True), key=lambda at: -times[at])
    return Audit(
        layers=request.layers,
        norms=norms,
        outliers=[(request.concepts[r], int(t), request.layers[k], float(times[r, t, k])) for r, t, k in found],
        in_sink=in_sink,
        agreement=[float(value) for value in agreement / (rows * len(pairs))] if pairs else [],
        categories=categories,
        structure=structure / ordered,
    )


def _chunks(path: Path) -> Iterator[tuple[int, Floats]]:
    """First row, and vectors ``[rows, templates, layers, d_model]`` in float64."""
    with safe_open(path, framework="np") as file:
        vectors = file.get_slice("vectors")
        rows = vectors.get_shape()[0]
        for start in range(0, rows, CHUNK_ROWS):
            yield start, vectors[start : min(start + CHUNK_ROWS, rows)].astype(np.float64)
