"""Extraction: concepts times templates through the teacher, in batches of like length, into a `Vectors` table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.concepts import Catalogue, split
from pipeline.errors import InputError, choices
from pipeline.teachers import Teacher, residuals
from pipeline.vectors import Vectors, stored

POOLS = ("last", "mean")


@dataclass(frozen=True)
class Prompt:
    """One concept in one template, as tokens.

    Attributes:
        concept, template: row and template number.
        token_ids: the prompt's tokens.
        own: which of them overlap the concept's characters, ascending.
    """

    concept: int
    template: int
    token_ids: list[int]
    own: list[int]


def extract(
    teacher: Teacher,
    catalogue: Catalogue,
    *,
    count: int | None = None,
    layers: Sequence[int],
    templates: Sequence[str],
    pool: str = "last",
    batch_tokens: int = 2048,
    padding_side: str | None = None,
    progress: Callable[[int], None] = lambda prompts: None,
) -> Vectors:
    """Read one vector a concept, template and layer.

    Args:
        teacher: the model.
        catalogue: the concepts; the split is that of the whole catalogue, whatever ``count`` is.
        count: extract only the first so many concepts, spread over the categories; all by default.
        layers: block numbers, ascending; 0 is the embedding output.
        templates: prompts, each with ``{concept}`` exactly once.
        pool: "last" reads the last token of the prompt, "mean" averages over the concept's tokens (in float32).
        batch_tokens: tokens of a batch, padding included.
        padding_side: "left" or "right"; the tokenizer's own by default. It does not change the vectors.
        progress: called after each batch with its number of prompts.

    Raises:
        InputError: a template without ``{concept}``, an unknown pool, too few concepts, or a concept without tokens.
    """
    check_request(catalogue, count, templates, pool)
    rows = catalogue.first(count) if count is not None else list(range(len(catalogue)))
    concepts = [catalogue.concepts[row] for row in rows]
    prompts = tokenize(teacher, concepts, templates)
    side = padding_side or teacher.tokenizer.padding_side
    values = np.zeros((len(concepts), len(templates), len(layers), teacher.d_model), np.float32)
    for batch in batches(prompts, batch_tokens):
        token_ids, mask = pad(batch, side)  # [batch, tokens]
        stream = residuals(teacher, token_ids.to(teacher.device), mask.to(teacher.device), layers)
        pooled = pool_positions(stream, pool_weights(batch, token_ids.shape[1], side, pool).to(teacher.device))
        where = [prompt.concept for prompt in batch], [prompt.template for prompt in batch]
        values[where] = pooled.transpose(0, 1).cpu().numpy()
        progress(len(batch))
    if not np.isfinite(values).all():
        raise InputError(f"--dtype {teacher.dtype}: the teacher's vectors overflow in it; try --dtype float32")
    ids, offsets = _own_tokens(prompts)
    vocab = np.unique(ids)
    embeddings = teacher.embedding_table[torch.from_numpy(vocab).to(teacher.device)].float().cpu().numpy()
    sides = split(catalogue)
    return Vectors(
        vectors=stored(values),
        token_ids=ids,
        token_offsets=offsets,
        token_vocab=vocab,
        token_embeddings=stored(embeddings),
        concepts=tuple(concepts),
        categories=tuple(catalogue.categories[row] for row in rows),
        splits=tuple(sides[row] for row in rows),
        layers=tuple(layers),
        templates=tuple(templates),
        teacher=teacher.name,
        revision=teacher.revision,
        pool=pool,
        dtype=teacher.dtype,
    )


def check_request(catalogue: Catalogue, count: int | None, templates: Sequence[str], pool: str) -> None:
    """Raise what `extract` would raise for a wrong request, before a teacher is loaded."""
    for template in templates:
        if template.count("{concept}") != 1:
            raise InputError(f"--template {template!r}: expected {{concept}} in it, exactly once")
    if pool not in POOLS:
        raise choices("pool", pool, POOLS)
    if count is not None:
        catalogue.first(count)


def tokenize(teacher: Teacher, concepts: Sequence[str], templates: Sequence[str]) -> list[Prompt]:
    """Every concept in every template as tokens, with the positions of the concept's own.

    Raises:
        InputError: a concept that leaves no token of its own.
    """
    prompts = []
    for number, template in enumerate(templates):
        start = template.index("{concept}")
        texts = [template.replace("{concept}", concept) for concept in concepts]
        encoded = teacher.tokenizer(texts, return_offsets_mapping=True)
        for row, (concept, ids, spans) in enumerate(
            zip(concepts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            stop = start + len(concept)
            own = [position for position, (left, right) in enumerate(spans) if left < stop and right > start]
            if not own:
                raise InputError(f"concept {concept!r}: the teacher's tokenizer gives it no token")
            prompts.append(Prompt(row, number, list(ids), own))
    return prompts


def batches(prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[list[Prompt]]:
    """Prompts of like length together, longest first, each batch within the budget (or of one prompt)."""
    batch: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt.token_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def pad(batch: Sequence[Prompt], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of a batch, ``[batch, tokens]`` each; the padding token is masked, so any id serves."""
    width = max(len(prompt.token_ids) for prompt in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, prompt in enumerate(batch):
        length = len(prompt.token_ids)
        place = slice(width - length, width) if side == "left" else slice(0, length)
        token_ids[row, place] = torch.tensor(prompt.token_ids)
        mask[row, place] = 1
    return token_ids, mask


def pool_weights(batch: Sequence[Prompt], width: int, side: str, pool: str) -> torch.Tensor:
    """How much each position counts in the vector of its row, ``[batch, tokens]``; rows sum to 1."""
    weights = torch.zeros(len(batch), width)
    for row, prompt in enumerate(batch):
        start = width - len(prompt.token_ids) if side == "left" else 0
        positions = prompt.own if pool == "mean" else [len(prompt.token_ids) - 1]
        weights[row, [start + position for position in positions]] = 1 / len(positions)
    return weights


def pool_positions(stream: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over positions in float32: ``[layers, batch, tokens, d_model]`` to ``[layers, batch, d_model]``.

    Padding may hold anything, NaN too (a row of masked attention), so it is selected away and not multiplied by zero.
    """
    chosen = torch.where(weights[None, :, :, None] > 0, stream.float(), 0.0)
    return torch.einsum("lbtd,bt->lbd", chosen, weights)


def _own_tokens(prompts: Sequence[Prompt]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each concept's own tokens in the first template, end to end, and where each begins."""
    own = [[prompt.token_ids[position] for position in prompt.own] for prompt in prompts if prompt.template == 0]
    offsets = np.cumsum([0, *map(len, own)], dtype=np.int64)
    return np.array([token for tokens in own for token in tokens], np.int64), offsets
