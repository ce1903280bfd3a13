"""Dropout, noise and mix-up, which keep students from memorising; drawn from the members' own seeds.

All concepts of a batch drop the same hidden units. Input features are dropped per concept: with one set per batch, a
student would see too few sets.

``S`` members, ``B`` concepts a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.settings import Cell


def mixup_weights(cells: Sequence[Cell], steps: Sequence[int]) -> Tensor:
    """Weights of mix-up (Zhang et al., 2018) for every member and step, ``[S, steps]``; empty without mix-up."""
    if not cells[0].mixup:
        return torch.zeros(len(cells), 0)
    draws = []
    for cell, number in zip(cells, steps, strict=True):
        weights = np.random.default_rng(cell.seed).beta(cell.mixup, cell.mixup, number)
        draws.append(torch.from_numpy(np.maximum(weights, 1 - weights)).float())
    return pad_sequence(draws, batch_first=True)


def mix_with_next(values: Tensor, weights: Tensor, is_real: Tensor) -> Tensor:
    """Mix each row of ``[S, B, columns]`` with the next of its batch, the last with the first; own shares ``[S]``."""
    # A random partner, as batches are shuffled. The padding at the end is no row's partner: `is_real` [S, B] is false.
    partner = torch.where(is_real.roll(-1, 1)[..., None], values.roll(-1, 1), values[:, :1])
    share = weights[:, None, None].to(values.dtype)
    return share * values + (1 - share) * partner


@dataclass(frozen=True)
class DropoutMasks:
    """The masks of one training step: 0 where dropped, else 1 / share kept."""

    inputs: Tensor  # [S or 1, B, features]
    units: tuple[Tensor, ...]  # [S or 1, 1, hidden] at each site, a place where a student drops hidden units


def add_with_dropout(stream: Tensor, change: Tensor, masks: DropoutMasks | None, site: int) -> Tensor:
    """``stream + change``, ``[S, rows, hidden]``, where the masks of the site apply to the change."""
    return stream + change if masks is None else torch.addcmul(stream, change, masks.units[site])


class Dropout:
    """Dropout masks and noise, drawn once per step and seed: members of one seed share them, and draw the same alone.

    Masks are drawn for the largest batch of any stack, so that smaller batches see the start of the same draw. Random
    bytes decide on the inputs, so that their share is rounded to 1/256; every step keeps the same number of hidden
    units. The scales are exact for these shares. All cells have the same options of dropout and noise.
    """

    def __init__(
        self, cells: Sequence[Cell], features: int, dropout_sites: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        cell = cells[0]
        self.batch_size, self.features, self.noise = cell.batch_size, features, cell.noise
        self.kept = round(256 * (1 - cell.dropout))  # of 256
        self.kept_units = max(1, round(cell.hidden_dim * self.kept / 256))  # of a site
        self.shape = dropout_sites, cell.hidden_dim
        self.dtype, self.device = dtype, device
        self.generators = {cell.seed: torch.Generator(device).manual_seed(cell.seed) for cell in cells}
        self.keep(cells)

    def states(self) -> dict[int, Tensor]:
        """The generator states, by seed."""
        return {seed: generator.get_state() for seed, generator in self.generators.items()}

    def restore(self, states: dict[int, Tensor]) -> None:
        """Set the generator states."""
        for seed, generator in self.generators.items():
            generator.set_state(states[seed])

    def keep(self, cells: Sequence[Cell]) -> None:
        """Draw only for these members from now on."""
        seeds = [cell.seed for cell in cells]
        self.generators = {seed: self.generators[seed] for seed in dict.fromkeys(seeds)}
        place = {seed: number for number, seed in enumerate(self.generators)}
        self.seed_of_member = torch.tensor([place[seed] for seed in seeds], device=self.device)

    def add_noise(self, inputs: Tensor) -> Tensor:
        """Add normal noise to inputs ``[S, B, features]``."""
        if not self.noise:
            return inputs
        shape = self.batch_size, inputs.shape[-1]
        drawn = [torch.randn(*shape, generator=each, device=self.device) for each in self.generators.values()]
        noise = self._per_member(torch.stack(drawn)[:, : inputs.shape[1]])  # [S or 1, B, features]
        return inputs + (self.noise * noise).to(inputs.dtype)

    def draw(self, rows: int) -> DropoutMasks | None:
        """Masks of the next step, for ``rows`` concepts; None where nothing is dropped."""
        if self.kept == 256:
            return None
        seeds, size = len(self.generators), rows * self.features
        words = torch.empty(  # eight random bytes each
            seeds, -(-self.batch_size * self.features // 8), dtype=torch.int64, device=self.device
        )
        scores = torch.empty(seeds, *self.shape, device=self.device)
        for row, score, generator in zip(words, scores, self.generators.values(), strict=True):
            row.random_(-(2**63), None, generator=generator)
            score.uniform_(generator=generator)
        inputs = torch.empty(seeds, size, dtype=self.dtype, device=self.device)
        torch.lt(words.view(torch.uint8)[:, :size], self.kept, out=inputs)
        inputs = inputs.mul_(256 / self.kept).view(-1, rows, self.features)  # [seeds, B, features]
        chosen = scores.topk(self.kept_units, sorted=False).indices  # [seeds, sites, kept]
        units = torch.zeros(scores.shape, dtype=self.dtype, device=self.device)
        units.scatter_(-1, chosen, scores.shape[-1] / self.kept_units)
        return DropoutMasks(self._per_member(inputs), self._per_member(units)[:, :, None].unbind(1))

    def _per_member(self, drawn: Tensor) -> Tensor:
        """Expand per-seed draws to members, where there are several seeds."""
        return drawn if len(self.generators) <= 1 else drawn[self.seed_of_member]
