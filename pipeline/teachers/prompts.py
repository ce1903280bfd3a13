"""Concepts in templates as the teacher's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.teachers.find import Teacher
from pipeline.teachers.tokenizer import encode


@dataclass(frozen=True)
class Prompt:
    """One concept in one template, as tokens."""

    token_ids: list[int]  # without those that a tokenizer appends
    positions: list[int]  # of the tokens that overlap the concept's characters, ascending

    @property
    def concept_ids(self) -> list[int]:
        """The concept's own tokens."""
        return [self.token_ids[position] for position in self.positions]

    def pooled(self, pool: str) -> list[int]:
        """The positions whose residual stream makes the vector."""
        return self.positions if pool == "mean" else [len(self.token_ids) - 1]


def tokenize(teacher: Teacher, concepts: Sequence[str], template: str) -> list[Prompt]:
    """Tokenize every concept in a template with ``{concept}``.

    Returns:
        One prompt per concept.

    Raises:
        InputError: a concept without a token of its own, a token without an embedding, or a prompt longer than the
            teacher's context.
    """
    start = template.index("{concept}")
    texts = [template.replace("{concept}", concept) for concept in concepts]
    context = getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None)
    prompts = []
    for concept, (ids, spans) in zip(concepts, _encode(teacher, texts), strict=True):
        stop = start + len(concept)
        positions = [position for position, (left, right) in enumerate(spans) if left < stop and right > start]
        if not positions:
            raise InputError(f"concept {concept!r}: the teacher's tokenizer gives it no token")
        if context is not None and len(ids) > context:
            raise InputError(f"concept {concept[:60]!r}: its prompt has {len(ids)} tokens, the teacher takes {context}")
        prompts.append(Prompt(ids, positions))
    return prompts


def template_prefix(teacher: Teacher, template: str) -> list[int]:
    """Tokens of the template's text before the concept."""
    [(ids, _)] = _encode(teacher, [template[: template.index("{concept}")].rstrip()])
    return ids


def _encode(teacher: Teacher, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokens and spans from `encode`, once every token has an embedding."""
    rows, encoded = len(teacher.embedding_table), encode(teacher.tokenizer, texts)
    for text, (ids, _) in zip(texts, encoded, strict=True):
        if ids and max(ids) >= rows:
            token: Any = teacher.tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"prompt {text[:60]!r}: the teacher has no embedding for the token {token!r} in it (number {max(ids)} "
                f"of {rows:,} rows); leave it out, or resize the model's embeddings"
            )
    return encoded
