"""How cost grows with the number of concepts: seconds and bytes of every phase, beside what a user would write instead.

The concepts are the most frequent English words. Each phase runs in a process of its own at each size:

- extraction: the command, from its start to the vectors file;
- ridge: all strengths, from the mapped file; beside it scikit-learn's `Ridge` with one strength, solver by solver, on
  arrays that are in memory already;
- kernel: all widths and strengths, with landmarks;
- descent: an MLP of 512 x 2, some epochs; beside it the same student in a plain PyTorch loop with a DataLoader;
- sweep and report: the commands, for a ridge regression and that MLP with one epoch;
- prediction: the student that the sweep left, for as many phrases.

The exponent is the slope of log seconds against log concepts. With ``--repeat`` the largest file is repeated with noise
up to a number of concepts, for the memory of training alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.phrases import fresh_phrases
from benchmarks.sweep import Pairs, plain_training, seconds
from pipeline import Student
from pipeline.data.dataset import Dataset, Subset
from pipeline.data.vectors import StreamedTensor, Vectors, read_vectors, stream_array, write_streamed
from pipeline.settings import Cell
from pipeline.training.closed_form import fit_kernel, fit_ridge
from pipeline.training.trainer import train_stack

HELD_OUT = 400  # concepts for validation and test
CPU = torch.device("cpu")
TOKEN_TABLES = ("token_vocab", "token_embeddings", "token_activations")
SOLVERS = ("cholesky", "svd")  # the iterative ones take many times as long here
GRID = """fixed: {{concepts: {concepts}, epochs: 1, hidden_dim: 512, layers: 2}}
axes: {{student: [ridge, mlp]}}
"""


def subset_of(vectors: str, size: int, **options: Any) -> tuple[Cell, Subset, Dataset]:
    """The cell, subset and data of a size, or of all training concepts for 0."""
    data = Dataset(read_vectors(Path(vectors)))
    cell = Cell(concepts=size or len(data.rows("train")), layer=data.vectors.middle_layer, **options)
    return cell, data.subset(cell), data


def ridge(vectors: str, size: int, _epochs: int) -> dict[str, Any]:
    """Ours, every strength."""
    begin = time.perf_counter()
    _, subset, _ = subset_of(vectors, size, student="ridge")
    made = time.perf_counter() - begin
    fitted: list[float] = []
    took = seconds(lambda: fitted.append(fit_ridge(subset).val_cosine))
    return {"seconds": took, "data": made, "val_cosine": fitted[0]}


def scikit_learn(vectors: str, size: int, _epochs: int, solver: str) -> dict[str, Any]:
    """scikit-learn's, with the strength that ours found best, on arrays in memory."""
    from sklearn.linear_model import Ridge

    _, subset, _ = subset_of(vectors, size, student="ridge")
    strength = fit_ridge(subset).strength
    x, y = subset.train.inputs[:].numpy(), (subset.train.targets[:] / subset.scale).numpy()
    regression = Ridge(alpha=strength, fit_intercept=False, solver=solver, copy_X=False)
    took = seconds(lambda: regression.fit(x, y))
    answer = torch.from_numpy(regression.predict(subset.val.inputs.numpy()))
    return {"seconds": took, "val_cosine": torch.cosine_similarity(answer, subset.val.targets).mean().item()}


def kernel(vectors: str, size: int, _epochs: int) -> dict[str, Any]:
    """Ours, every width and strength."""
    _, subset, _ = subset_of(vectors, size, student="kernel")
    fitted: list[float] = []
    took = seconds(lambda: fitted.append(fit_kernel(subset).val_cosine))
    return {"seconds": took, "val_cosine": fitted[0]}


def descent(vectors: str, size: int, epochs: int) -> dict[str, Any]:
    """Ours, from the mapped file to the trained student."""
    cell, subset, _ = subset_of(vectors, size, hidden_dim=512, layers=2, epochs=epochs)
    scores: list[float] = []
    took = seconds(lambda: list(train_stack([cell], [subset], CPU, lambda step: scores.append(step.val_cosine))))
    return {"seconds": took, "val_cosine": max(scores)}


def loaded(inputs: torch.Tensor, targets: torch.Tensor, batch_size: int) -> Pairs:
    """The batches of an epoch, from a DataLoader."""
    loader: Pairs = DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True)
    return loader


def data_loader(vectors: str, size: int, epochs: int) -> dict[str, Any]:
    """The same student in a plain loop with a DataLoader."""
    cell, subset, _ = subset_of(vectors, size, hidden_dim=512, layers=2, epochs=epochs)
    rows: list[dict[str, float]] = []
    took = seconds(lambda: rows.extend(plain_training(cell, subset.train, subset.val, subset.scale, loaded)))
    return {"seconds": took, "val_cosine": rows[-1]["best"]}


def prediction(student: str, size: int, _epochs: int) -> dict[str, Any]:
    """The student of the sweep, for phrases that it has not met."""
    loaded_student, phrases = Student.load(student), fresh_phrases(size)
    return {"seconds": seconds(lambda: loaded_student.encode(phrases))}


PHASES: dict[str, Callable[[str, int, int], dict[str, Any]]] = {
    "ridge": ridge, "kernel": kernel, "descent": descent, "DataLoader": data_loader, "prediction": prediction,
} | {f"scikit-learn {solver}": partial(scikit_learn, solver=solver) for solver in SOLVERS}  # fmt: skip


def watch_memory(process: int, peak: list[int]) -> None:
    """Keep the largest anonymous memory of a process, in bytes; mapped pages of files can be given back at any time."""
    status = Path(f"/proc/{process}/status")
    while True:
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            peak[0] = max(peak[0], 1024 * int(lines["RssAnon"].split()[0]))
        except (OSError, KeyError, ValueError):  # it has ended
            return
        time.sleep(0.02)


def run(command: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """Run a command; its seconds and its memory at most, and what it printed."""
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "MLFLOW_TRACKING_URI": ""}
    begin = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True) as process:
        peak = [0]
        watcher = threading.Thread(target=watch_memory, args=(process.pid, peak), daemon=True)
        watcher.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - begin, "anonymous": peak[0]}, printed


def pipeline(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a command of the pipeline."""
    return run([sys.executable, "-m", "pipeline", *arguments], folder)[0]


def phase(folder: Path, name: str, vectors: Path, size: int, epochs: int) -> dict[str, Any]:
    """Run a phase in a process of its own."""
    own = ["--phase", name, "--vectors", str(vectors), "--sizes", str(size), "--epochs", str(epochs)]
    measured, printed = run([sys.executable, "-m", "benchmarks.growth", *own], folder)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return measured | found


def measure(folder: Path, size: int, epochs: int, solvers: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run all phases at a size."""
    vectors, grid, results = folder / f"{size}.safetensors", folder / f"growth{size}.yaml", folder / f"results{size}"
    words = f"wordfreq:en:{size + HELD_OUT}"
    if not vectors.exists():
        yield "extraction", pipeline(folder, "extract", "--teacher", "smollm2-135m", "--concepts", words,
                                     "--layers", "15", "--output", str(vectors))  # fmt: skip
    for name in ("ridge", *(f"scikit-learn {solver}" for solver in solvers), "kernel", "descent", "DataLoader"):
        yield name, phase(folder, name, vectors, size, epochs)
    grid.write_text(GRID.format(concepts=size))
    asked = ("--grid", str(grid), "--vectors", str(vectors), "--output", str(results))
    yield "sweep", pipeline(folder, "sweep", *asked)
    yield "report", pipeline(folder, "report", "--results", str(next(results.glob("*_results_*.json"))))
    student = next(path for path in results.glob("*_student*") if path.is_dir())
    yield "prediction", phase(folder, "prediction", student, size, epochs)


def repeated(vectors: Vectors, number: int) -> Iterator[np.ndarray[Any, Any]]:
    """The vectors again and again, with noise of a tenth of their spread, up to a number of concepts."""
    draw, spread = np.random.default_rng(0), vectors.vectors[:1000].astype(np.float32).std(0) / 10
    for start in range(0, number, len(vectors.concepts)):
        values = vectors.vectors[: number - start].astype(np.float32)
        yield (values + spread * draw.standard_normal(values.shape, np.float32)).astype(vectors.vectors.dtype)


def repeat(vectors: Vectors, number: int, path: Path) -> None:
    """Write a vectors file of many concepts, which repeats those of a smaller one."""
    times = math.ceil(number / len(vectors.concepts))
    rows = np.tile(np.arange(len(vectors.concepts)), times)[:number]
    tokens = vectors.token_rows.take(rows)
    made = replace(
        vectors,
        concepts=tuple(f"{vectors.concepts[row]} {place}" for place, row in enumerate(rows)),
        categories=("word",) * number,
        splits=tuple(
            vectors.splits[row] if place < len(vectors.concepts) else "train" for place, row in enumerate(rows)
        ),
    )
    shape = (number, *vectors.vectors.shape[1:])
    tensors = [
        stream_array("token_ids", vectors.token_vocab[tokens.values]),
        stream_array("token_offsets", tokens.offsets),
        *(
            stream_array(name, getattr(vectors, name))
            for name in ("token_vocab", "token_embeddings", "token_activations")
        ),
        StreamedTensor("vectors", vectors.vectors.dtype, shape, lambda: repeated(vectors, number)),
    ]
    write_streamed(path, made.header, tensors)


def table(rows: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """A row a phase: its seconds and memory at each size, and the exponent."""
    sizes = sorted({size for measured in rows.values() for size in measured})
    lines = [
        f"| phase | {' | '.join(f'{size:,}' for size in sizes)} | exponent | us a concept | MB at most | cosine |",
        "| --- |" + " --- |" * (len(sizes) + 4),
    ]
    for name, measured in rows.items():
        known = sorted(measured)
        times = [measured[size]["seconds"] for size in known]
        slope = np.polyfit(np.log(known), np.log(times), 1)[0] if len(known) > 1 else math.nan
        last = measured[known[-1]]
        cells = [f"{measured[size]['seconds']:.2f}" if size in measured else "" for size in sizes]
        cosine = f"{last['val_cosine']:.3f}" if "val_cosine" in last else ""
        each, memory = f"{1e6 * times[-1] / known[-1]:.0f}", f"{last['anonymous'] / 1e6:,.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {slope:.2f} | {each} | {memory} | {cosine} |")
    return lines


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="training concepts")
    parser.add_argument("--epochs", type=int, default=10, help="of the descent")
    parser.add_argument("--folder", type=Path, help="where files are kept and found again (default: a temporary one)")
    parser.add_argument("--repeat", type=int, help="measure the memory of ridge and descent at so many concepts")
    parser.add_argument("--phase", choices=PHASES, help="run this phase alone, on --vectors or a student's folder")
    parser.add_argument("--vectors", help="the vectors file, or the student, of --phase")
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(PHASES[options.phase](options.vectors, options.sizes[0], options.epochs)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, dict[int, dict[str, Any]]] = {}
        largest = max(options.sizes)
        for size in options.sizes:
            solvers = SOLVERS if size < largest or len(options.sizes) == 1 else SOLVERS[:1]
            for name, measured in measure(folder, size, options.epochs, solvers):
                rows.setdefault(name, {})[size] = measured
                print(f"{size:,} {name}: {measured}", file=sys.stderr)  # noqa: T201
        if options.repeat:
            path = folder / f"repeated{options.repeat}.safetensors"
            repeat(read_vectors(folder / f"{largest}.safetensors"), options.repeat, path)
            for name, epochs in (("ridge", 1), ("descent", 1)):
                rows[f"{name}, repeated"] = {options.repeat: phase(folder, name, path, 0, epochs)}
        print("\n".join(table(rows)))  # noqa: T201


if __name__ == "__main__":
    main()
