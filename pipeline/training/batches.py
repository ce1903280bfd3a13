"""The batches of a stack: which concepts each step shows each member, and their inputs and targets on the device.

Every epoch is a new shuffle from the member's own seed, in batches of similar size. The inputs and targets of a small
stack stay in memory; those of a large one are computed some steps ahead, with the same values.

``S`` members, ``B`` concepts a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.dataset import Subset
from pipeline.settings import Cell
from pipeline.training.curriculum import easiest_first, num_shown

RESIDENT_BYTES = 1 << 30  # of a stack's inputs and targets, up to which they stay in memory
GPU_SHARE = 0.25  # of a GPU's free memory, instead
ROWS_AHEAD = 8192  # concepts that are computed at once where they do not


class Batch(NamedTuple):
    """What one step shows."""

    inputs: Tensor  # [S, B, features]
    targets: Tensor  # [S, B, d_model], in units of each member's scale
    weights: Tensor  # [S, B], 0 for padding, else 1


def steps_of_epoch(concepts: int, batch_size: int) -> int:
    """The fewest steps that show every concept once."""
    return -(-concepts // batch_size)


def largest_batch(concepts: int, batch_size: int) -> int:
    """Concepts of a step; the batches of an epoch differ by one concept at most."""
    return -(-concepts // steps_of_epoch(concepts, batch_size))


class Batches:
    """The batches of all steps of some members, whose inputs have one type."""

    def __init__(self, members: Sequence[tuple[Cell, Subset]], dtype: torch.dtype, device: torch.device) -> None:
        self.subsets, self.dtype, self.device = [subset for _, subset in members], dtype, device
        self.size = max(largest_batch(len(subset.train.rows), cell.batch_size) for cell, subset in members)
        # [S, steps, B], numbers of the members' augmented examples, -1 for padding; on the CPU
        plans = [_plan(cell, subset, self.size) for cell, subset in members]
        self.order = pad_sequence(plans, batch_first=True, padding_value=-1)
        self._data: tuple[Tensor, Tensor] | None = None  # [S, N variants, features] and [S, N variants, d_model]
        if self._resident_bytes() <= _room(device):
            self._data = self._load()
        self._prepare()

    def _resident_bytes(self) -> int:
        examples = [subset.augmented for subset in self.subsets]
        row = examples[0].inputs.shape[1] * self.dtype.itemsize + 4 * examples[0].targets.shape[1]
        return len(examples) * max(len(one.rows) for one in examples) * row

    def _load(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all members, padded with zeros."""
        examples = [subset.augmented for subset in self.subsets]
        shape, width = (len(examples), max(len(one.rows) for one in examples)), examples[0].targets.shape[1]
        inputs = torch.zeros(*shape, examples[0].inputs.shape[1], dtype=self.dtype, device=self.device)
        targets = torch.zeros(*shape, width, device=self.device)
        for member, (one, subset) in enumerate(zip(examples, self.subsets, strict=True)):
            stop = 0
            for x, y in one.chunks():
                start, stop = stop, stop + len(x)
                inputs[member, start:stop], targets[member, start:stop] = x, y / subset.scale
        return inputs, targets

    def _prepare(self) -> None:
        """Make what all steps use, to save operations in each step."""
        self.is_real = (self.order >= 0).to(self.device)  # [S, steps, B]
        self._ahead: tuple[int, Tensor, Tensor] = (0, torch.empty(0), torch.empty(0))  # first step, and batches from it
        if self._data is not None:
            # Rows in the members' concatenated examples: to select rows of one matrix is several times as fast as of
            # many.
            first = torch.arange(len(self.subsets)) * self._data[0].shape[1]  # [S]
            rows = self.order.clamp(min=0) + first[:, None, None]
            self._rows = rows.transpose(0, 1).flatten(1).to(self.device)  # [steps, S B]

    def __getitem__(self, step: int) -> Batch:
        weights = self.is_real[:, step].float()
        if self._data is not None:
            flat = (values.flatten(0, 1).index_select(0, self._rows[step]) for values in self._data)
            inputs, targets = (values.view(*weights.shape, -1) for values in flat)
            return Batch(inputs, targets, weights)
        if not 0 <= step - self._ahead[0] < len(self._ahead[1]):
            self._ahead = step, *self._read(step, max(1, ROWS_AHEAD // weights.numel()))
        first, ahead_inputs, ahead_targets = self._ahead
        return Batch(ahead_inputs[step - first], ahead_targets[step - first], weights)

    def _read(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some steps, ``[count, S, B, columns]``."""
        order = self.order[:, step : step + count].clamp(min=0)  # [S, count, B]
        inputs, targets = [], []
        for rows, subset in zip(order, self.subsets, strict=True):
            x, y = (matrix[rows.flatten()] for matrix in (subset.augmented.inputs, subset.augmented.targets))
            inputs.append(x.to(self.dtype).view(*rows.shape, -1))
            targets.append((y / subset.scale).view(*rows.shape, -1))
        return torch.stack(inputs, 1).to(self.device), torch.stack(targets, 1).to(self.device)

    def keep(self, rows: slice | list[int], subsets: Sequence[Subset]) -> None:
        """Keep the members in some rows, whose subsets these are."""
        self.subsets = list(subsets)
        self.order = self.order[rows]
        if self._data is not None:
            self._data = (self._data[0][rows], self._data[1][rows])
        self._prepare()


def _room(device: torch.device) -> int:
    """Bytes that a stack's inputs and targets may take."""
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else RESIDENT_BYTES


def _plan(cell: Cell, subset: Subset, batch: int) -> Tensor:
    """Numbers of the augmented examples of each step, ``[steps, B]``, padded with -1."""
    generator = torch.Generator().manual_seed(cell.seed)
    size, variants = len(subset.train.rows), subset.variants
    steps = torch.arange(steps_of_epoch(size, cell.batch_size))
    sizes = size // len(steps) + (steps < size % len(steps))
    is_real = torch.arange(batch) < sizes[:, None]  # [steps per epoch, B]
    epochs = torch.full((cell.epochs, *is_real.shape), -1, dtype=torch.int32)
    easiest = easiest_first(cell, subset)
    for epoch in range(cell.epochs):
        chosen = torch.randperm(size, generator=generator)
        if easiest is not None:  # a full number of steps, on the concepts that this epoch shows
            chosen = easiest[chosen % num_shown(cell, epoch, size)]
        if variants > 1:
            chosen = chosen * variants + torch.randint(variants, (size,), generator=generator)
        epochs[epoch, is_real] = chosen.int()
    return epochs.flatten(0, 1)
