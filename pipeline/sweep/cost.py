"""What cells cost, and who trains which: stacks dealt out to workers by their cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from pipeline.data.dataset import Dataset
from pipeline.settings import Cell
from pipeline.training.kinds import KINDS
from pipeline.training.stack import largest_batch, steps_of_epoch
from pipeline.training.trainer import epochs, stack_key

UNEVEN = 1.2  # a worker may have so many times its share before a stack is split
STEP = 1.3e8  # what a step costs beside its products, in their operations, as the shapes of the scaling grid show
OVERHEAD = 1.5  # of a sweep over its matrix products in float32, as measured by benchmarks/sweep.py


def training_flops(cell: Cell, data: Dataset) -> float:
    """Floating-point operations of a cell's matrix products.

    Two a weight and row forwards, two for the gradient of the weights, and two for that of the inputs, which the first
    layer does without; two a weight and validation row, every epoch. What dropout spares is counted too. A closed form
    counts as its factorisation.
    """
    feature_count, kind, val = data.feature_count(cell), KINDS[cell.student], len(data.rows("val", cell.split))
    if kind.solve:
        return 8.0 * cell.concepts * feature_count * min(cell.concepts, feature_count)
    forward = kind.flops(cell, data)
    first = 2.0 * data.vectors.d_model * data.max_tokens if cell.student == "transformer" else 2.0 * feature_count
    return epochs(cell) * (cell.concepts * (3 * forward - first * cell.hidden_dim) + val * forward)


def stacks_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that can train together."""
    stacks: dict[object, list[Cell]] = {}
    for cell in cells:
        stacks.setdefault(stack_key(cell), []).append(cell)
    return list(stacks.values())


def shares(cells: Sequence[Cell], workers: int, cost: Callable[[Cell], float]) -> list[list[list[Cell]]]:
    """Deal stacks out to workers, the most expensive first, each to the one that has the least.

    A stack is split, in halves of like cost, only where a worker would otherwise have over `UNEVEN` times its share.

    Args:
        cells: what there is to do, in an order that all workers agree on.
        workers: how many there are.
        cost: what a cell costs, in any unit.

    Returns:
        For each worker its stacks. Their union is all cells, each once.
    """
    pieces = stacks_of(cells)
    price = {cell: cost(cell) for cell in cells}
    while True:
        loads, dealt = _deal(pieces, workers, price)
        splittable = [piece for piece in pieces if len(piece) > 1]
        if max(loads) <= UNEVEN * sum(loads) / workers or not splittable:
            return dealt
        largest = max(splittable, key=lambda piece: sum(price[cell] for cell in piece))
        pieces.remove(largest)
        pieces += parts_of(largest, 2, price)


def with_little_padding(stack: Sequence[Cell], price: Mapping[Cell, float]) -> list[list[Cell]]:
    """A stack in parts whose batches are of one size, or of several where their steps cost more than rows that pad.

    For CPUs, where rows that pad cost as much as others.

    Args:
        stack: cells that can train together.
        price: `training_flops` of each.
    """
    if KINDS[stack[0].student].solve:
        return [list(stack)]
    alike: dict[int, list[Cell]] = {}
    for cell in stack:
        alike.setdefault(largest_batch(cell.concepts, cell.batch_size), []).append(cell)
    parts: list[list[Cell]] = []
    largest = 0
    for batch, cells in sorted(alike.items(), reverse=True):
        if not parts or padding(cells, largest, price) > STEP * max(map(steps, cells)):
            parts.append([])
            largest = batch
        parts[-1] += cells
    return parts


def padding(cells: Sequence[Cell], batch: int, price: Mapping[Cell, float]) -> float:
    """Operations of the rows that pad the batches of cells up to a larger one."""
    return sum(price[cell] * (batch / largest_batch(cell.concepts, cell.batch_size) - 1) for cell in cells)


def steps(cell: Cell) -> int:
    """Steps that a cell takes at most."""
    return cell.epochs * steps_of_epoch(cell.concepts, cell.batch_size)


def parts_of(stack: Sequence[Cell], number: int, price: Mapping[Cell, float]) -> list[list[Cell]]:
    """A stack in so many parts of like cost, or fewer where it has fewer cells."""
    _, dealt = _deal([[cell] for cell in stack], number, price)
    return [[cell for [cell] in part] for part in dealt if part]


def _deal(
    pieces: Sequence[list[Cell]], workers: int, price: Mapping[Cell, float]
) -> tuple[list[float], list[list[list[Cell]]]]:
    loads, dealt = [0.0] * workers, [list[list[Cell]]() for _ in range(workers)]
    prices = [sum(price[cell] for cell in piece) for piece in pieces]
    for number in sorted(range(len(pieces)), key=lambda number: -prices[number]):
        least = loads.index(min(loads))
        loads[least] += prices[number]
        dealt[least].append(pieces[number])
    return loads, dealt


def expected_seconds(cells: Sequence[Cell], data: Dataset, device: torch.device) -> float:
    """About how long the cells take on one worker like this: their products at the rate measured now."""
    a, b = torch.randn(128, 1024, device=device), torch.randn(1024, 512, device=device)
    best, end = math.inf, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        begin = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - begin)
    return OVERHEAD * best * sum(training_flops(cell, data) for cell in cells) / (2 * a.numel() * b.shape[1])


def flops_of_prediction(cell: Cell, data: Dataset) -> float:
    """Floating-point operations of one prediction, the early blocks that a truncated student runs included."""
    own = KINDS[cell.student].flops(cell, data)
    return own + (teacher_flops(cell.blocks, data) if cell.student == "truncated" else 0.0)


def teacher_flops(blocks: int, data: Dataset) -> float:
    """About what a teacher's first blocks cost for the tokens of a concept."""
    tokens = len(data.vectors.token_ids) / len(data.vectors.concepts)
    return 2.0 * teacher_parameters(blocks, data) * tokens


def teacher_parameters(blocks: int, data: Dataset) -> int:
    """About how many weights a teacher's first blocks have: 12 d_model^2 a block, as usual."""
    return 12 * data.vectors.d_model**2 * blocks


def number_of_parameters(cell: Cell, data: Dataset) -> int:
    """Weights and biases of the cell's student."""
    return KINDS[cell.student].weights(cell, data)


def plan_rows(cells: Sequence[Cell], data: Dataset, workers: int) -> tuple[list[str], list[list[str]]]:
    """A table of what would be done: header and rows, stack by stack."""
    header = ["cell", "objective", "epochs", "parameters", "GFLOP", "stack", "worker"]
    rows = []
    stack_number = 0
    for worker, stacks in enumerate(shares(cells, workers, lambda cell: training_flops(cell, data))):
        for stack in stacks:
            stack_number += 1
            for cell in stack:
                size, work = number_of_parameters(cell, data), training_flops(cell, data) / 1e9
                name = data.omit_default(cell).name
                values = [name, cell.objective, cell.epochs, f"{size:,}", f"{work:,.1f}", stack_number, worker]
                rows.append([str(value) for value in values])
    return header, rows
