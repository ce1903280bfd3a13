"""How long a sweep will take here: counted operations, bytes and requests, at rates that are measured now."""

from __future__ import annotations

import timeit
from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.analysis.rows import ridge_baseline
from pipeline.data.dataset import Dataset
from pipeline.settings import Cell
from pipeline.sweep.cost import STEP_FLOPS, number_of_steps, stacks_of, training_flops
from pipeline.training.kinds import KINDS

OVERHEAD = 1.5  # time of training over that of its matrix products in float32, as benchmarks/sweep.py measures it
READINGS = 5  # of a subset's training inputs: their statistics, the prior and the Gram matrix, the nearest concepts
SAMPLE = 512  # concepts whose reading is timed
# In runs of `LOOP`, which is timed here: work of Python and of libraries, and not of matrix products.
LOOP = "for i in range(100000): i * i"
TRACKING = 100  # of a finished cell, on disk and in MLflow
FIXED = 6200  # to start, to draw the report and to export the student
BENCHMARKS = 5000  # to load the teacher, and to measure the students on data of others


def expected_seconds(
    cells: Sequence[Cell], data: Dataset, device: torch.device, workers: int = 1, has_benchmarks: bool = False
) -> float:
    """Estimate how long a sweep takes with some workers like this one.

    Args:
        cells: of the whole sweep.
        data: what they train on.
        device: of each worker.
        workers: their number; each has a share of the cells, and one of them concludes.
        has_benchmarks: whether students are measured on benchmarks.

    Returns:
        Wall time in seconds from the start of the command to its report.
    """
    descents = [cell for cell in cells if not KINDS[cell.student].closed_form]
    solutions = [cell for cell in cells if KINDS[cell.student].closed_form]
    steps = sum(max(map(number_of_steps, stack)) for stack in stacks_of(descents))
    operations = OVERHEAD * sum(training_flops(cell, data) for cell in descents) + STEP_FLOPS * steps
    operations += sum(training_flops(cell, data) for cell in solutions)
    baselines = list(dict.fromkeys(map(ridge_baseline, cells)))  # solved by the worker that concludes
    last = sum(training_flops(cell, data) for cell in baselines) / _product_rate(device)
    last += READINGS * sum(baseline.concepts for baseline in baselines) * _reading_seconds(baselines[0], data)
    loop = min(timeit.repeat(LOOP, number=1, repeat=5))
    shared = operations / _product_rate(device) + loop * TRACKING * len(cells)
    return shared / workers + last + loop * (FIXED + BENCHMARKS * has_benchmarks)


def _product_rate(device: torch.device) -> float:
    """Operations of matrix products in float32 in a second."""
    a, b = torch.randn(128, 1024, device=device), torch.randn(1024, 512, device=device)
    best = min(timeit.repeat(lambda: (a @ b).sum().item(), number=1, repeat=100))
    return 2 * a.numel() * b.shape[1] / best


def _reading_seconds(cell: Cell, data: Dataset) -> float:
    """Time to read the inputs of one training concept."""
    sample = data.subset(replace(cell, concepts=min(SAMPLE, cell.concepts)))
    return min(timeit.repeat(lambda: sample.train.inputs[:], number=1, repeat=5)) / len(sample.train.rows)
