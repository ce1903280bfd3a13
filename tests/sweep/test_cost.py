"""Work is dealt out once, evenly, and stacks stay whole where they can."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.settings import Cell
from pipeline.sweep.cost import (
    MAX_IMBALANCE,
    STEP_FLOPS,
    assign_stacks,
    number_of_steps,
    padding_flops,
    split_by_batch,
    stacks_of,
    training_flops,
)
from pipeline.sweep.engine import Engine
from pipeline.sweep.grid import read_grid
from pipeline.sweep.spool import Spool
from pipeline.training.batches import largest_batch

CELLS = st.builds(Cell, concepts=st.integers(2, 900), hidden_dim=st.sampled_from([8, 16, 512]), seed=st.integers(0, 9))


def cost(cell):
    return cell.concepts * cell.hidden_dim


@given(st.lists(CELLS, min_size=1, max_size=40, unique=True), st.integers(1, 9))
def test_every_cell_has_one_worker(cells, workers):
    dealt = assign_stacks(cells, workers, cost)
    assert len(dealt) == workers
    flat = [cell for stacks in dealt for stack in stacks for cell in stack]
    assert sorted(flat, key=repr) == sorted(cells, key=repr)
    assert dealt == assign_stacks(cells, workers, cost)
    loads = [sum(cost(cell) for stack in stacks for cell in stack) for stacks in dealt]
    whole = sum(len(stacks) for stacks in dealt) == len(stacks_of(cells))
    if not whole:  # a split had a reason, and helped as far as single cells allow
        assert max(loads) <= max(MAX_IMBALANCE * sum(loads) / workers, sum(loads) / workers + max(map(cost, cells)))


@given(st.lists(CELLS, min_size=1, max_size=40, unique=True))
def test_a_cpu_multiplies_few_rows_that_pad(cells):
    flops = {cell: STEP_FLOPS * cell.concepts * cell.hidden_dim / 1e3 for cell in cells}
    for stack in stacks_of(cells):
        parts = split_by_batch(stack, flops)
        assert sorted((cell for part in parts for cell in part), key=repr) == sorted(stack, key=repr)
        batches = [[largest_batch(cell.concepts, cell.batch_size) for cell in part] for part in parts]
        for part, sizes, before in zip(parts, batches, [[], *batches], strict=False):
            largest = max(sizes)
            for size in set(sizes):
                alike = [cell for cell, own in zip(part, sizes, strict=True) if own == size]
                assert padding_flops(alike, largest, flops) <= STEP_FLOPS * max(map(number_of_steps, alike))
                if before and size == largest:  # with those before it, it would have cost more
                    assert padding_flops(alike, max(before), flops) > STEP_FLOPS * max(map(number_of_steps, alike))


@given(st.integers(1, 900), st.integers(1, 300))
def test_batches_are_few_and_of_like_size(concepts, batch_size):
    batch = largest_batch(concepts, batch_size)
    steps = -(-concepts // batch)
    assert batch <= batch_size
    assert steps == -(-concepts // batch_size)
    assert steps * (batch - 1) < concepts <= steps * batch


def test_the_scaling_grid_in_shards(data):
    cells = read_grid("scaling").cells
    for workers in (1, 2, 6):
        dealt = assign_stacks(cells, workers, lambda cell: training_flops(cell, data))
        loads = [sum(training_flops(cell, data) for stack in stacks for cell in stack) for stacks in dealt]
        assert max(loads) <= MAX_IMBALANCE * sum(loads) / workers
        assert workers > 1 or dealt == [
            sorted(stacks_of(cells), key=lambda s: -sum(training_flops(c, data) for c in s))
        ]


def test_what_a_cell_costs(data):
    cell = Cell(concepts=700, hidden_dim=512, layers=4, epochs=100, layer=15)
    first, rest = 1152 * 512, 4 * 512**2 + 512 * 576
    assert training_flops(cell, data) == 100 * (700 * (4 * first + 6 * rest) + 2 * 200 * (first + rest))


def test_a_stack_that_costs_more_than_a_cores_share_is_split(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sweep.engine.max_parallel_stacks", lambda device: 2)
    cells = [Cell(concepts=number, layer=15) for number in (100, 700, 1838)]
    ridge = Cell(student="ridge", concepts=100, layer=15)
    engine = Engine(data, torch.device("cpu"), {cell: str(cell) for cell in (*cells, ridge)}, Spool(tmp_path))
    engine.add_stacks([cells, [ridge]])
    tasks = [task.cells for group in engine._waiting for task in group]
    assert [cells[2]] in tasks
    assert sorted((cell for task in tasks for cell in task), key=repr) == sorted((*cells, ridge), key=repr)
