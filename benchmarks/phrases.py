"""Phrases that no student has met."""

from __future__ import annotations

import random

import wordfreq


def fresh_phrases(number: int) -> list[str]:
    """Phrases of one to three frequent English words, drawn at random."""
    words = [word for word in wordfreq.iter_wordlist("en") if word.isalpha() and len(word) > 1][:40_000]
    draw = random.Random(0)  # noqa: S311 (not for secrets)
    return [" ".join(draw.choices(words, k=draw.choice((1, 2, 2, 3)))) for _ in range(number)]
