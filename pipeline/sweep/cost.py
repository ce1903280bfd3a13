"""The cost of cells in floating-point operations, and the stacks that each worker trains, assigned by that cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline.data.dataset import Dataset
from pipeline.settings import Cell
from pipeline.training.batches import largest_batch, steps_of_epoch
from pipeline.training.kinds import KINDS
from pipeline.training.trainer import epochs, stack_key

MAX_IMBALANCE = 1.2  # load of a worker, in units of its equal share, from which a stack is split
STEP_FLOPS = 1.3e8  # overhead of a training step, in operations of its products, measured on the scaling grid
DOUBLE = 2.0  # time of an operation in float64, as closed forms have it, over one in float32


def training_flops(cell: Cell, data: Dataset) -> float:
    """Floating-point operations of a cell's matrix products in the whole training."""
    # Two a weight and row forwards, two for the gradient of the weights, and two for that of the inputs, which the
    # first layer does without; two a weight and validation row, every epoch. What dropout spares is counted too.
    feature_count, kind, val = data.feature_count(cell), KINDS[cell.student], len(data.rows("val", cell.split))
    if kind.closed_form:
        return DOUBLE * kind.closed_form.flops(cell.concepts, feature_count, data.vectors.d_model, val)
    forward = kind.size(cell, data).flops
    first = 2.0 * data.vectors.d_model * data.max_tokens if cell.student == "transformer" else 2.0 * feature_count
    return epochs(cell) * (cell.concepts * (3 * forward - first * cell.hidden_dim) + val * forward)


def stacks_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group cells that can train together."""
    stacks: dict[object, list[Cell]] = {}
    for cell in cells:
        stacks.setdefault(stack_key(cell), []).append(cell)
    return list(stacks.values())


def assign_stacks(cells: Sequence[Cell], workers: int, cost: Callable[[Cell], float]) -> list[list[list[Cell]]]:
    """Assign stacks to workers, the most expensive first, each to the worker with the least load; by worker."""
    # A stack is split, in halves of like cost, only where a worker would otherwise have too much. All workers pass the
    # cells in the same order, and so assign the same.
    stacks, costs = stacks_of(cells), {cell: cost(cell) for cell in cells}
    while True:
        loads, assigned = _assign_greedily(stacks, workers, costs)
        splittable = [stack for stack in stacks if len(stack) > 1]
        if max(loads) <= MAX_IMBALANCE * sum(loads) / workers or not splittable:
            return assigned
        largest = max(splittable, key=lambda stack: sum(costs[cell] for cell in stack))
        stacks.remove(largest)
        stacks += split_evenly(largest, 2, costs)


def split_evenly(stack: Sequence[Cell], number: int, costs: Mapping[Cell, float]) -> list[list[Cell]]:
    """Split a stack into a number of parts of like cost, or fewer where it has fewer cells."""
    _, assigned = _assign_greedily([[cell] for cell in stack], number, costs)
    return [[cell for [cell] in part] for part in assigned if part]


def _assign_greedily(
    stacks: Sequence[list[Cell]], workers: int, costs: Mapping[Cell, float]
) -> tuple[list[float], list[list[list[Cell]]]]:
    """The load and the stacks of each worker."""
    loads, assigned = [0.0] * workers, [list[list[Cell]]() for _ in range(workers)]
    for cost, stack in sorted(((sum(costs[cell] for cell in s), s) for s in stacks), key=lambda pair: -pair[0]):
        least = loads.index(min(loads))
        loads[least] += cost
        assigned[least].append(stack)
    return loads, assigned


def split_by_batch(stack: Sequence[Cell], flops: Mapping[Cell, float]) -> list[list[Cell]]:
    """Split a stack by batch size where, on a CPU, rows that pad batches cost more than steps of a further stack."""
    if KINDS[stack[0].student].closed_form:
        return [list(stack)]
    by_batch: dict[int, list[Cell]] = {}
    for cell in stack:
        by_batch.setdefault(largest_batch(cell.concepts, cell.batch_size), []).append(cell)
    parts: list[list[Cell]] = []
    largest = 0
    for batch, cells in sorted(by_batch.items(), reverse=True):
        if not parts or padding_flops(cells, largest, flops) > STEP_FLOPS * max(map(number_of_steps, cells)):
            parts.append([])
            largest = batch
        parts[-1] += cells
    return parts


def padding_flops(cells: Sequence[Cell], batch: int, flops: Mapping[Cell, float]) -> float:
    """Operations of the rows that pad the batches of cells up to a larger batch."""
    return sum(flops[cell] * (batch / largest_batch(cell.concepts, cell.batch_size) - 1) for cell in cells)


def number_of_steps(cell: Cell) -> int:
    """Training steps that a cell takes at most."""
    return cell.epochs * steps_of_epoch(cell.concepts, cell.batch_size)


def flops_of_prediction(cell: Cell, data: Dataset) -> float:
    """Floating-point operations of one prediction, with the early blocks that a truncated student runs."""
    own = KINDS[cell.student].size(cell, data).flops
    return own + (teacher_flops(cell.blocks, data) if cell.student == "truncated" else 0.0)


def teacher_flops(blocks: int, data: Dataset) -> float:
    """Estimate the operations of a teacher's first blocks for the tokens of a concept."""
    tokens = len(data.vectors.token_ids) / len(data.vectors.concepts)
    return 2.0 * teacher_parameters(blocks, data) * tokens


def teacher_parameters(blocks: int, data: Dataset) -> int:
    """Estimate the weights of a teacher's first blocks: 12 d_model^2 a block, as usual."""
    return 12 * data.vectors.d_model**2 * blocks


def number_of_parameters(cell: Cell, data: Dataset) -> int:
    """Weights and biases of the cell's student."""
    return KINDS[cell.student].size(cell, data).weights


def plan_table(cells: Sequence[Cell], data: Dataset, workers: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of the cells, stack by stack, with the worker of each."""
    header = ["cell", "objective", "epochs", "parameters", "GFLOP", "stack", "worker"]
    flops = {cell: training_flops(cell, data) for cell in cells}
    assigned = assign_stacks(cells, workers, flops.__getitem__)
    rows = []
    pairs = [(worker, stack) for worker, stacks in enumerate(assigned) for stack in stacks]
    for number, (worker, stack) in enumerate(pairs, 1):
        for cell in stack:
            size, gigaflops = f"{number_of_parameters(cell, data):,}", f"{flops[cell] / 1e9:,.1f}"
            name = data.omit_default(cell).name
            read = [str(getattr(cell, option)) if option in KINDS[cell.student].reads else "" for option in header[1:3]]
            rows.append([name, *read, size, gigaflops, str(number), str(worker)])
    return header, rows
