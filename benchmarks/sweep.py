"""How fast the scaling grid trains: the stack, its members one by one, and the floor. Run: make bench.

The peer is the same trainer with one student at a time (what a process a cell would do, without its start-up). The
physical limit is the time that the matrix products of training and validation alone would take at the rate at which
this machine multiplies matrices of these shapes in float32, measured in the same run. Medians of several rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.features import Catalogued
from pipeline.grid import read_grid
from pipeline.processes import start
from pipeline.schedule import stacks_of, training_flops
from pipeline.sweep import prepare, run_sweep
from pipeline.tracking import connect
from pipeline.training import train_stack
from pipeline.vectors import read_vectors


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def rate(rows: int = 128, width: int = 512, inner: int = 1152) -> float:
    """Float32 operations a second of a matrix product of the grid's largest shape."""
    a, b = torch.randn(rows, inner), torch.randn(inner, width)
    times = [seconds(lambda: [a @ b for _ in range(50)]) for _ in range(9)]
    return 50 * 2 * rows * width * inner / statistics.median(times)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--vectors", default="data/vectors/smollm2-135m.safetensors")
    options = parser.parse_args()
    accelerator = start()
    data = Catalogued(read_vectors(Path(options.vectors).resolve()))
    name, cells = read_grid("scaling", options.epochs)
    cells = prepare(cells, data)
    stacks = stacks_of(cells)
    # The grid's block is the file's middle one; `prepare` has named it.
    subsets = {cell: data.subset(cell.concepts, cell.layer or 0) for cell in cells}

    def stacked() -> None:
        for stack in stacks:
            list(train_stack(stack, [subsets[cell] for cell in stack], accelerator))

    def one_by_one() -> None:
        for cell in cells:
            list(train_stack([cell], [subsets[cell]], accelerator))

    def tracked() -> None:
        with tempfile.TemporaryDirectory() as folder:
            run_sweep(
                name, cells, data, connect(), accelerator, params={}, vectors_uri=options.vectors,
                output=Path(folder), resume=False,
            )  # fmt: skip

    total = sum(training_flops(cell, data) for cell in cells)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        connect()  # the database is made once, before the clock runs
        rounds = [
            {
                "floor (matrix products only)": total / rate(),
                "stacks": seconds(stacked),
                "one student at a time": seconds(one_by_one),
                "stacks, tracked to SQLite": seconds(tracked),
            }
            for _ in range(options.rounds)
        ]
    median = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    print(f"{len(cells)} cells, {options.epochs} epochs, {torch.get_num_threads()} threads, {options.rounds} rounds\n")  # noqa: T201
    print("| what | median seconds | x floor |\n| --- | --- | --- |")  # noqa: T201
    for key, value in median.items():
        print(f"| {key} | {value:.1f} | {value / median['floor (matrix products only)']:.2f} |")  # noqa: T201


if __name__ == "__main__":
    main()
