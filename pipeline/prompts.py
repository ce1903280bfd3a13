"""Concepts in templates as the teacher's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.teachers import Teacher


@dataclass(frozen=True)
class Prompt:
    """One concept in one template, as tokens.

    Attributes:
        token_ids: the prompt's tokens.
        own: which of them overlap the concept's characters, ascending.
    """

    token_ids: list[int]
    own: list[int]

    @property
    def own_ids(self) -> list[int]:
        """The concept's own tokens."""
        return [self.token_ids[position] for position in self.own]

    def read(self, pool: str) -> list[int]:
        """The positions whose residual stream makes the vector."""
        return self.own if pool == "mean" else [len(self.token_ids) - 1]


def tokenize(teacher: Teacher, concepts: Sequence[str], template: str) -> list[Prompt]:
    """Every concept in a template as tokens, with the positions of the concept's own.

    Raises:
        InputError: a concept that leaves no token of its own, or a prompt longer than the teacher's context.
    """
    start = template.index("{concept}")
    texts = [template.replace("{concept}", concept) for concept in concepts]
    encoded = teacher.tokenizer(texts, return_offsets_mapping=True)
    room = getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None)
    prompts = []
    for concept, ids, spans in zip(concepts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        stop = start + len(concept)
        own = [position for position, (left, right) in enumerate(spans) if left < stop and right > start]
        if not own:
            raise InputError(f"concept {concept!r}: the teacher's tokenizer gives it no token")
        if room is not None and len(ids) > room:
            raise InputError(f"concept {concept[:60]!r}: its prompt has {len(ids)} tokens, the teacher takes {room}")
        prompts.append(Prompt(list(ids), own))
    return prompts


def beginning_of(teacher: Teacher, template: str) -> list[int]:
    """The tokens of what stands before the concept."""
    return list(teacher.tokenizer(template[: template.index("{concept}")].rstrip())["input_ids"])
