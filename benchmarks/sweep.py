"""How fast the scaling grid trains: the peers, ours, and the floor. Run: make bench.

All train the same cells on the same vectors and data splits, and their best validation cosines are compared. The
peers: one `train` process a cell; our trainer with stacks of one, one after another; the same loop in plain PyTorch
with a fused optimizer; Ray Tune with that loop and its MLflow callback, with one core a trial, its best here. Ours is
the sweep as users run it, from reading the vectors to the student that it leaves, tracked to SQLite, and the cells and
their results without MLflow. The floor is the time of the matrix products of training and validation at the float32
rate of this machine for matrices of these shapes, measured in the same round; products that dropout spares ours are in
it. Medians of several rounds. ``--sizes`` measures time a cell against the number of cells instead.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.analysis.results import results_of
from pipeline.commands.find_sweep import newest_results
from pipeline.commands.results_file import read_results
from pipeline.commands.sweep import train_grid
from pipeline.data.dataset import Dataset, Subset
from pipeline.data.examples import Examples, LazyExamples
from pipeline.data.vectors import read_vectors
from pipeline.devices import training_precision
from pipeline.metrics import cosines
from pipeline.processes import cores
from pipeline.settings import Cell, SweepOptions
from pipeline.sweep.cells import cell_key, prepare
from pipeline.sweep.cost import stacks_of, training_flops
from pipeline.sweep.engine import Engine
from pipeline.sweep.grid import read_grid
from pipeline.sweep.spool import Spool
from pipeline.tracking import connect
from pipeline.training.trainer import train_stack

CPU = torch.device("cpu")


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def rate(rows: int = 128, width: int = 512, inner: int = 1152) -> float:
    """Float32 operations a second of a matrix product of the grid's largest shape, on all cores."""
    a, b = torch.randn(rows, inner), torch.randn(inner, width)
    times = [seconds(lambda: [a @ b for _ in range(200)]) for _ in range(9)]
    return 200 * 2 * rows * width * inner / statistics.median(times)


class PlainStudent(nn.Module):
    """The MLP of the grid as a user of PyTorch writes it."""

    def __init__(self, features: int, d_model: int, cell: Cell) -> None:
        super().__init__()
        self.first = nn.Linear(features, cell.hidden_dim)
        self.blocks = nn.ModuleList(nn.Linear(cell.hidden_dim, cell.hidden_dim) for _ in range(cell.layers))
        self.last = nn.Linear(cell.hidden_dim, d_model)
        self.dropout = nn.Dropout(cell.dropout)
        for layer in (self.first, self.last):
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
        for block in self.blocks:
            nn.init.zeros_(block.weight)  # type: ignore[arg-type]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[B, features]`` to ``[B, d_model]``."""
        hidden = self.first(self.dropout(inputs))
        for block in self.blocks:
            hidden = hidden + self.dropout(F.gelu(block(hidden)))
        answer: torch.Tensor = self.last(hidden)
        return answer


Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]  # batches of inputs and targets


def shuffled(inputs: torch.Tensor, targets: torch.Tensor, batch_size: int) -> Pairs:
    """The batches of an epoch, by selecting rows."""
    return ((inputs[rows], targets[rows]) for rows in torch.split(torch.randperm(len(inputs)), batch_size))


def plain_training(
    cell: Cell, train: LazyExamples, val: Examples, scale: float, batches: Callable[..., Pairs] = shuffled
) -> Iterator[dict[str, float]]:
    """Train one student; the losses and scores of each epoch."""
    torch.manual_seed(cell.seed)
    inputs, targets = train.inputs[:], train.targets[:] / scale
    student = PlainStudent(inputs.shape[1], targets.shape[1], cell)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=cell.learning_rate, weight_decay=cell.weight_decay, fused=True
    )
    steps = cell.epochs * -(-len(inputs) // cell.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / max(1.0, 0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    best = -1.0
    for _ in range(cell.epochs):
        student.train()
        losses = []
        for x, y in batches(inputs, targets, cell.batch_size):
            loss = 1 - F.cosine_similarity(student(x), y, dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        student.eval()
        with torch.no_grad():
            score = cosines(student(val.inputs), val.targets).mean().item()
        best = max(best, score)
        yield {"train_loss": statistics.mean(losses), "val_cosine": score, "best": best}


def ray_tune(cells: Sequence[Cell], subsets: Sequence[Subset], folder: Path, cpus: int) -> float:
    """Ray Tune with a trial a cell; the best validation cosine. Starting Ray is not counted by the caller."""
    from ray import put, tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    data = put([(subset.train, subset.val, subset.scale) for subset in subsets])

    def trial(config: dict[str, Any]) -> None:
        from ray import get

        torch.set_num_threads(cpus)
        train, val, scale = get(data)[config["number"]]
        for row in plain_training(cells[config["number"]], train, val, scale):
            tune.report(row)

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": cpus}),
        param_space={"number": tune.grid_search(list(range(len(cells))))},
        run_config=tune.RunConfig(
            storage_path=str(folder / "ray"),
            verbose=0,
            callbacks=[MLflowLoggerCallback(os.environ["MLFLOW_TRACKING_URI"], experiment_name="ray")],
        ),
    )
    results = tuner.fit()
    if results.errors:
        raise RuntimeError(str(results.errors[0]))
    return max(float((results[number].metrics or {})["best"]) for number in range(len(results)))


@contextmanager
def database() -> Iterator[Path]:
    """A fresh folder to work in, with a tracking database that is there before the clock runs."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        connect()
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def options_of(cell: Cell) -> list[str]:
    """A cell as options of ``train``."""
    values = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
    given = {f"--{name.replace('_', '-')}": value for name, value in values.items() if value is not None}
    return [name if value is True else f"{name}={value}" for name, value in given.items() if value is not False]


class Benchmark:
    """The ways to train one grid; each method is one of them, and returns the best validation cosine."""

    def __init__(self, vectors: Path, epochs: int, seeds: int = 1) -> None:
        self.options = SweepOptions("scaling", epochs, str(vectors), seeds, report=False, resume=False)
        self.vectors = vectors
        self.data = Dataset(read_vectors(vectors))
        self.cells = prepare(read_grid("scaling", epochs, seeds).cells, self.data)
        self.subsets = [self.data.subset(cell) for cell in self.cells]

    def tracked(self, _folder: Path) -> float:
        """The sweep as users run it, without its report: the results file and the best student are written too."""
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            train_grid(self.options, read_grid("scaling", self.options.epochs, self.options.seeds))
        return float(read_results(newest_results())["best"]["val_cosine"])

    def untracked(self, folder: Path) -> float:
        """The same without MLflow: the same lanes and results, baselines included, students and snapshots on disk."""
        keys = {cell: cell_key(cell, self.data.vectors.identity, training_precision(CPU)) for cell in self.cells}
        with Engine(self.data, CPU, keys, Spool(folder / "spool")) as engine:
            engine.add_stacks(stacks_of(self.cells))
            rows = list(engine.train())
        return float(results_of("scaling", self.data, rows, "")["best"]["val_cosine"])

    def one_by_one(self, _folder: Path) -> float:
        """One student after another, on all cores, nothing written."""
        torch.set_num_threads(cores())
        pairs = zip(self.cells, self.subsets, strict=True)
        return max(t.metrics["val_cosine"] for cell, subset in pairs for t in train_stack([cell], [subset], CPU))

    def plain_loop(self, _folder: Path) -> float:
        """One student after another as a user of PyTorch writes it, in float32."""
        torch.set_num_threads(cores())
        pairs = zip(self.cells, self.subsets, strict=True)
        return max(
            row["best"]
            for cell, subset in pairs
            for row in plain_training(cell, subset.train, subset.val, subset.scale)
        )

    def process_a_cell(self, folder: Path) -> float:
        """``train`` once a cell, without its report, as ours."""
        best = 0.0
        for number, cell in enumerate(self.cells):
            command = [sys.executable, "-m", "pipeline", "train", *options_of(cell), f"--vectors={self.vectors}"]
            variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
            subprocess.run(
                [*command, f"--output={number}", "--no-report"], check=True, capture_output=True, env=variables
            )
        for run in connect().runs("cell", "FINISHED"):
            best = max(best, run.data.metrics["val_cosine"])
        shutil.rmtree(folder / "results")
        return best

    def ray(self, folder: Path) -> float:
        """Ray Tune, one core a trial."""
        return ray_tune(self.cells, self.subsets, folder, 1)

    def floor(self) -> float:
        """Seconds of the matrix products alone."""
        torch.set_num_threads(cores())
        return sum(training_flops(cell, self.data) for cell in self.cells) / rate()


def measure(way: Callable[[Path], float]) -> tuple[float, float]:
    """Wall time of one way, and the best validation cosine that it found."""
    with database() as folder:
        begin = time.perf_counter()
        best = way(folder)
        return time.perf_counter() - begin, best


def compare(vectors: Path, epochs: int, rounds: int) -> list[str]:
    """A table of all ways against the floor."""
    import ray

    bench = Benchmark(vectors, epochs)
    ways = {
        "ours, tracked to SQLite": bench.tracked,
        "ours, untracked": bench.untracked,
        "ours with stacks of one, one after another, untracked": bench.one_by_one,
        "plain PyTorch loop, fused optimizer, untracked": bench.plain_loop,
        "Ray Tune, MLflow callback": bench.ray,
        "one process a cell, tracked to SQLite": bench.process_a_cell,
    }
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    ray.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False, logging_level=40)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    floors = []
    for _ in range(rounds):
        floors.append(bench.floor())
        for name, way in ways.items():
            rows[name].append(measure(way))
            print(f"{name}: {rows[name][-1][0]:.1f} s", file=sys.stderr)  # noqa: T201
    floor, ours = statistics.median(floors), statistics.median(row[0] for row in rows["ours, tracked to SQLite"])
    table = [
        f"{len(bench.cells)} cells, {epochs} epochs, {cores()} cores, medians of {rounds} rounds",
        "",
        "| what | seconds | x ours | x floor | best validation cosine |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, measured in rows.items():
        median = statistics.median(row[0] for row in measured)
        best = statistics.median(row[1] for row in measured)
        table.append(f"| {name} | {median:.1f} | {median / ours:.2f} | {median / floor:.2f} | {best:.3f} |")
    return [*table, f"| floor: the matrix products in float32 | {floor:.1f} | {floor / ours:.2f} | 1 | |"]


def against_size(vectors: Path, epochs: int, rounds: int) -> list[str]:
    """A table of the time a cell against the number of cells."""
    table = ["| cells | seconds | seconds a cell |", "| --- | --- | --- |"]
    for seeds in (1, 4, 10):
        bench = Benchmark(vectors, epochs, seeds)
        median = statistics.median(measure(bench.tracked)[0] for _ in range(rounds))
        table.append(f"| {len(bench.cells)} | {median:.1f} | {median / len(bench.cells):.2f} |")
    return table


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--vectors", default="data/vectors/smollm2-135m.safetensors")
    parser.add_argument("--sizes", action="store_true", help="24, 96 and 240 cells instead of the peers")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    table = (against_size if options.sizes else compare)(
        Path(options.vectors).resolve(), options.epochs, options.rounds
    )
    print("\n".join(table))  # noqa: T201


if __name__ == "__main__":
    main()
