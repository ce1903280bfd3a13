"""Prompts as a tree of tokens (a trie), in which every distinct prefix stands once.

A causal model's residual stream at a position depends on the tokens up to it alone. So a prefix of several prompts is
computed once: the tokens that all prompts of a batch share (the template's text before the concept), and below them
every shared prefix of concepts ("ice", "ice cream"). The tree is found on token ids, never on text, because a
tokenizer may merge across any boundary of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenTree:
    """Prompts below a common prefix, as nodes in the order of their depth.

    Attributes:
        prompts: ``[prompts]`` which of the caller's prompts these are.
        token_ids: ``[nodes]`` the token of each node.
        depths: ``[nodes]`` its position in the prompt; the prefix takes the positions before.
        levels: for each depth the nodes' first number, and ``[nodes of that depth, tokens since the prefix]`` the
            nodes on the way from the prefix to each, itself last.
        paths: ``[prompts, longest]`` the nodes of each prompt from the prefix on, -1 beyond its end.
    """

    prompts: Ints
    token_ids: Ints
    depths: Ints
    levels: tuple[tuple[int, Ints], ...]
    paths: Ints


def common_prefix(prompts: Sequence[Sequence[int]], longest: int) -> int:
    """The number of tokens that all prompts begin with, at most ``longest``."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # all prompts between them share their prefix
    limit = min(len(first), len(last), longest)
    return next((place for place in range(limit) if first[place] != last[place]), limit)


def grow(prompts: Sequence[Sequence[int]], prefix: int, budget: int, long: int) -> Iterator[TokenTree]:
    """Grow trees over all prompts, each of at most ``budget`` nodes (or of one prompt), long prompts apart.

    Args:
        prompts: token ids; all begin with the same ``prefix`` tokens and go on after them.
        prefix: the number of common tokens, which are in no tree.
        budget: tokens of a tree.
        long: tokens after the prefix beyond which a prompt is long.

    Yields:
        The trees.
    """
    is_long = np.array([len(prompt) - prefix > long for prompt in prompts])
    for rows in (np.flatnonzero(~is_long), np.flatnonzero(is_long)):
        if rows.size:
            yield from _grow([prompts[row] for row in rows.tolist()], rows, prefix, budget)


def _grow(prompts: Sequence[Sequence[int]], rows: Ints, prefix: int, budget: int) -> Iterator[TokenTree]:
    lengths = np.array([len(prompt) - prefix for prompt in prompts])
    table = np.full((len(prompts), lengths.max()), -1, np.int64)  # [prompts, longest], -1 beyond a prompt's end
    table[np.arange(table.shape[1]) < lengths[:, None]] = [token for prompt in prompts for token in prompt[prefix:]]
    order = np.lexsort(table.T[::-1])
    table, lengths = table[order], lengths[order]
    own = _first_occurrences(table).sum(1)  # [prompts] tokens that a prompt does not share with the one before it
    budget = min(budget, -(-int(own.sum()) // -(-int(own.sum()) // budget)) + int(lengths.max()))  # of even size
    start = nodes = 0
    for row, (length, new) in enumerate(zip(lengths, own, strict=True)):
        if row > start and nodes + new > budget:
            yield _tree(table[start:row], rows[order[start:row]], prefix)
            start, nodes = row, 0
        nodes += length if row == start else new
    yield _tree(table[start:], rows[order[start:]], prefix)


def _first_occurrences(table: Ints) -> NDArray[np.bool_]:
    """Where a row of a sorted table of prompts differs from the row above up to there, ``[prompts, longest]``."""
    new = np.ones(table.shape, bool)
    new[1:] = np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
    return new & (table >= 0)


def _tree(table: Ints, prompts: Ints, prefix: int) -> TokenTree:
    new = _first_occurrences(table)
    sizes = new.sum(0)  # [longest] nodes of each depth
    starts = np.cumsum(sizes) - sizes
    # Rows that share a beginning are neighbours, so a row's node is the newest one of its depth.
    paths = np.where(table >= 0, new.cumsum(0) - 1 + starts, -1)
    levels = tuple((int(starts[depth]), paths[new[:, depth], : depth + 1]) for depth in np.flatnonzero(sizes))
    depths = np.repeat(np.arange(len(sizes)), sizes) + prefix
    return TokenTree(prompts, table.T[new.T], depths, levels, paths)
