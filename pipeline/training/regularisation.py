"""What keeps students from learning by heart: dropout, noise and mix-up, drawn from the members' own seeds.

``S`` members, ``B`` concepts a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.settings import Cell
from pipeline.training.dropout import Dropped
from pipeline.training.kinds import KINDS


def mixup_weights(cells: Sequence[Cell], steps: Sequence[int]) -> Tensor:
    """Weights of mix-up (Zhang et al., 2018) from the members' own seeds, ``[S, steps]``; empty without it.

    Args:
        cells: of the members, which share the option.
        steps: how many each takes.
    """
    if not cells[0].mixup:
        return torch.zeros(len(cells), 0)
    draws = []
    for cell, number in zip(cells, steps, strict=True):
        weights = np.random.default_rng(cell.seed).beta(cell.mixup, cell.mixup, number)
        draws.append(torch.from_numpy(np.maximum(weights, 1 - weights)).float())
    return pad_sequence(draws, batch_first=True)


def mix_with_next(values: Tensor, weights: Tensor, there: Tensor) -> Tensor:
    """Each row with some of the next row of its batch, the last with the first, ``[S, B, columns]``.

    Batches are shuffled, so a neighbour is a random partner. Rows that pad stand at the end and are nobody's.
    """
    partner = torch.where(there.roll(-1, 1)[..., None], values.roll(-1, 1), values[:, :1])
    share = weights[:, None, None].to(values.dtype)
    return share * values + (1 - share) * partner


class Dropout:
    """What is dropped, and noise, drawn once a step and seed: members of one seed share it, and draw the same alone.

    Of a mask as much is drawn as the largest batch of any stack needs, so that smaller ones see the beginning of the
    same. It is drawn as random bytes, eight at once, so its share is rounded to 1/256; that of hidden units, of which
    every step keeps as many, is rounded to 1/hidden_dim. The scales are exact for these.
    """

    def __init__(self, cells: Sequence[Cell], features: int, dtype: torch.dtype, device: torch.device) -> None:
        cell = cells[0]
        self.batch_size, self.features, self.noise = cell.batch_size, features, cell.noise
        self.kept = round(256 * (1 - cell.dropout))  # of 256
        self.units = max(1, round(cell.hidden_dim * self.kept / 256))  # that a site keeps
        self.shape = KINDS[cell.student].dropout_sites * cell.layers, cell.hidden_dim
        self.dtype, self.device = dtype, device
        self.generators = {cell.seed: torch.Generator(device).manual_seed(cell.seed) for cell in cells}
        self.keep(cells)

    def states(self) -> dict[int, Tensor]:
        """What the next draws follow from, by seed."""
        return {seed: generator.get_state() for seed, generator in self.generators.items()}

    def restore(self, states: dict[int, Tensor]) -> None:
        """Go on where others stopped."""
        for seed, generator in self.generators.items():
            generator.set_state(states[seed])

    def keep(self, cells: Sequence[Cell]) -> None:
        """Draw for these members only from now on."""
        seeds = [cell.seed for cell in cells]
        self.generators = {seed: self.generators[seed] for seed in dict.fromkeys(seeds)}
        of_seed = {seed: number for number, seed in enumerate(self.generators)}
        self.members = None if len(of_seed) <= 1 else torch.tensor([of_seed[s] for s in seeds], device=self.device)

    def noisy(self, inputs: Tensor) -> Tensor:
        """Inputs ``[S, B, features]`` with normal noise, of which members of one seed share the draw."""
        if not self.noise:
            return inputs
        drawn = torch.stack(
            [
                torch.randn(self.batch_size, inputs.shape[-1], generator=generator, device=self.device)
                for generator in self.generators.values()
            ]
        )[:, : inputs.shape[1]]  # [seeds, B, features]
        return inputs + (self.noise * self._of_members(drawn)).to(inputs.dtype)

    def draw(self, rows: int) -> Dropped | None:
        """What the next step drops; None where nothing is dropped.

        Args:
            rows: B.
        """
        if self.kept == 256:
            return None
        words = torch.empty(
            len(self.generators), -(-self.batch_size * self.features // 8), dtype=torch.int64, device=self.device
        )
        ranks = torch.empty(len(self.generators), *self.shape, device=self.device)
        for row, rank, generator in zip(words, ranks, self.generators.values(), strict=True):
            row.random_(-(2**63), None, generator=generator)
            rank.uniform_(generator=generator)
        drawn = torch.empty(len(words), rows * self.features, dtype=self.dtype, device=self.device)
        torch.lt(words.view(torch.uint8)[:, : rows * self.features], self.kept, out=drawn)
        mask = drawn.mul_(256 / self.kept).view(-1, rows, self.features)  # [seeds, B, features]
        units = ranks.topk(self.units, sorted=False).indices  # [seeds, sites, kept]
        masks = torch.zeros(ranks.shape, dtype=self.dtype, device=self.device)
        masks.scatter_(-1, units, ranks.shape[-1] / self.units)
        return Dropped(self._of_members(mask), self._of_members(masks)[:, :, None].unbind(1))

    def _of_members(self, drawn: Tensor) -> Tensor:
        """From one a seed to one a member, where members have several."""
        return drawn if self.members is None else drawn[self.members]
