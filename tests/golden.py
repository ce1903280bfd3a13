"""Golden numbers: what the code computes today, small enough to compute again in every run of the tests.

Run this file to write them again: ``python tests/golden.py``. It refuses to write numbers that have moved under an
unchanged ``RESULTS_VERSION``: finished cells of that version would be taken for what is computed now.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from vocabularies import find_vocabulary

from pipeline.data.dataset import Dataset
from pipeline.data.vectors import read_vectors
from pipeline.settings import RESULTS_VERSION, Cell
from pipeline.sweep.cells import prepare
from pipeline.sweep.cost import stacks_of
from pipeline.sweep.grid import canonical, read_grid
from pipeline.training.export import checkpoint, export
from pipeline.training.trainer import train_stack

FILE = Path(__file__).with_name("golden.json")
VECTORS = FILE.parent.parent / "data" / "vectors" / "smollm2-135m.safetensors"
TEMPLATES = VECTORS.with_name("smollm2-135m-templates.safetensors")
COMMAND = "python tests/golden.py"
# Sums in float32 depend on their order, and so on the processor and the number of threads: by 1e-7 of a sum. After
# these few steps numbers are 1e-6 apart between instructions of SSE and of AVX2, and between 1 and 2 threads; other
# processors have fifty times that. A warm-up of another length moves every one that descends by more.
TOLERANCE = 5e-5
TOLERANCE_OF_SHORT = 4e-3  # bfloat16 has 8 bits: sums in another order are rounded to another neighbour
TOLERANCE_OF_VECTORS = 5e-3  # in units of a vector's length: numbers of 8 bits, of which one may fall on either side

SMALL = Cell(concepts=100, hidden_dim=32, layers=1, epochs=3, batch_size=32)
# Every kind of student, and every option of a cell away from its default.
OPTIONS = [
    {},
    {"student": "transformer"},
    {"student": "ridge"},
    {"student": "kernel"},
    {"student": "truncated"},
    {"student": "truncated", "blocks": 4},
    {"hidden_dim": 48},
    {"layers": 0},
    {"seed": 1},
    {"layer": 22},
    {"batch_size": 48},
    {"learning_rate": 1e-3},
    {"weight_decay": 10.0},
    {"dropout": 0.0},
    {"precision": "bfloat16"},
    {"skip": True},
    {"inputs": "embeddings"},
    {"inputs": "embeddings-first+ngrams"},
    {"inputs": "embeddings-whitened"},
    {"inputs": "bag"},
    {"inputs": "activations+block4"},
    {"objective": "mse"},
    {"objective": "infonce", "temperature": 0.2},
    {"objective": "cosine+0.1*infonce"},
    {"token_dropout": 0.3},
    {"noise": 0.2},
    {"mixup": 0.4},
    {"curriculum": "frequency"},
    {"curriculum": "ridge", "pace": 0.9},
    {"split": "categories"},
    {"evaluations": "log", "epochs": 10},
    {"patience": 1, "learning_rate": 0.05, "epochs": 10},
]
OF_TEMPLATES = [{"targets": "mean"}, {"targets": "all"}, {"targets": "all", "student": "ridge"}]
TEXTS = ["volcano", "slow cooking", "a phrase never heard", "2 + 2 = 4"]


def numbers_of(cells, data):
    """Of each cell, by its options: the curves, and what is measured at the end."""
    found = {}
    for stack in stacks_of(cells):
        for trained in train_stack(stack, [data.subset(cell) for cell in stack], torch.device("cpu")):
            values = {name: trained.metrics[name] for name in ("val_cosine", "test_cosine", "test_r2")}
            curves = {
                f"{name} {epoch}": value
                for name in ("train_loss", "val_cosine")
                for epoch, value in zip(trained.curves["epoch"], trained.curves.get(name, []), strict=False)
            }
            found[options_of(trained.cell)] = {name: round(value, 6) for name, value in {**curves, **values}.items()}
    return found


def options_of(cell):
    """The options of a cell that are not the default, as text."""
    return " ".join(f"{name}={value}" for name, value in vars(cell).items() if value != getattr(Cell(), name))


def compute():
    """All golden numbers."""
    data = Dataset(read_vectors(VECTORS))
    small = [replace(SMALL, **options) for options in OPTIONS]
    numbers = numbers_of(prepare([*read_grid("scaling", 2).cells, *map(canonical, small)], data), data)
    templates = Dataset(read_vectors(TEMPLATES))
    small = [replace(SMALL, **options) for options in OF_TEMPLATES]
    numbers |= numbers_of(prepare(list(map(canonical, small)), templates), templates)
    [cell] = prepare([replace(SMALL, hidden_dim=192)], data)
    [trained] = train_stack([cell], [data.subset(cell)], torch.device("cpu"))
    whole = checkpoint(cell, trained.parameters, data.subset(cell), data, trained.metrics)
    vocabulary = find_vocabulary(data.vectors, VECTORS)
    exported = export(whole, data, vocabulary).encode(TEXTS, normalize_embeddings=True)
    shown = exported[:, :: exported.shape[1] // 24].astype(np.float64).round(5)
    return {"cells": numbers, "vectors": dict(zip(TEXTS, shown.tolist(), strict=True))}


def moved(golden, now):
    """What is not as it was, one line a number."""
    lines = [f"{name}: no longer computed" for name in golden["cells"] if name not in now["cells"]]
    for cell, values in now["cells"].items():
        before = golden["cells"].get(cell, {})
        tolerance = TOLERANCE_OF_SHORT if "bfloat16" in cell else TOLERANCE
        lines += [
            f"{cell}: {name} {before.get(name)} -> {value}"
            for name, value in values.items()
            if name not in before or abs(before[name] - value) > tolerance
        ]
    for text, vector in now["vectors"].items():
        before = golden["vectors"].get(text, [0.0] * len(vector))
        error = np.abs(np.subtract(before, vector)).max()
        if error > TOLERANCE_OF_VECTORS:
            lines.append(f"vector of {text!r}: {error:.5f} away")
    return lines


def main():
    """Write the numbers, unless they have moved and the version has not."""
    now = compute()
    if FILE.exists():
        golden = json.loads(FILE.read_text())
        if golden["version"] == RESULTS_VERSION and (lines := moved(golden, now)):
            sys.exit("\n".join([*lines, "results moved: raise RESULTS_VERSION in pipeline/settings.py first"]))
    FILE.write_text(json.dumps({"version": RESULTS_VERSION, **now}, indent=1) + "\n")


if __name__ == "__main__":
    main()
