"""Interventions: predicted vectors replace activations in the teacher, whose next-token distributions are compared.

A vector replaces the true activation at its block and position, and the rest of the teacher runs as usual.
`kl_recovered` compares next-token distributions: 1 for the true vector, 0 for the mean vector. It is the "loss
recovered" of sparse autoencoders with the mean in place of an ablation (Bricken et al., 2023, "Towards
monosemanticity").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache

from pipeline.teachers.find import Teacher
from pipeline.teachers.prompts import tokenize

BATCH_TOKENS = 2048
MAX_CONCEPTS = 1000  # put into the teacher: their distributions over its vocabulary are kept, for every student
BOOTSTRAPS = 2000
SAME_KL = 1e-3  # nats: two passes that differ by less differ by rounding, also in bfloat16


@contextmanager
def at_block(teacher: Teacher, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the residual stream ``[batch, tokens, d_model]`` after block ``layer``; 0 is the embedding output."""

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    hook = (
        teacher.blocks[layer - 1].register_forward_hook(after)
        if layer
        else teacher.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Make blocks return their input, in passes where their output is replaced."""

    def hand_on(hidden_states: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return hidden_states

    for block in blocks:
        block.forward = hand_on
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class NextTokenDistributions:
    """A teacher's next-token distributions after prompts, from its own activations or from vectors in their place.

    Vectors replace the last token's activation after block ``layer``; 0 is the embedding output. The activations of
    all but the last position do not depend on the last one: their keys and values are computed once, and each call
    costs one position per prompt in the blocks behind ``layer``. Models that cannot continue from a cache run whole
    prompts.
    """

    def __init__(self, teacher: Teacher, concepts: Sequence[str], template: str, layer: int) -> None:
        self.teacher, self.layer = teacher, layer
        head: Any = teacher.causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.to(teacher.device)  # an extraction does not move it
        self.prompts = [prompt.token_ids for prompt in tokenize(teacher, concepts, template)]
        lengths = np.array([len(ids) for ids in self.prompts])
        self.batches = []  # of prompts of one length, so that none is padded
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            self.batches += np.array_split(rows, -(-len(rows) * int(length) // BATCH_TOKENS))
        self._caches: list[Cache | None] = list(map(self._cache, self.batches))
        if not self._can_continue_from_cache():
            self._caches = [None] * len(self.batches)
        with torch.inference_mode():
            true = [self._next_tokens(*pair, None).cpu() for pair in zip(self.batches, self._caches, strict=True)]
            self.true = torch.cat(true)[np.argsort(np.concatenate(self.batches))]  # [concepts, vocabulary], float32

    def _ids(self, batch: NDArray[np.intp]) -> Tensor:
        return torch.tensor([self.prompts[row] for row in batch], device=self.teacher.device)

    @torch.inference_mode()
    def _cache(self, batch: NDArray[np.intp]) -> Cache | None:
        """Keys and values of all but the last position; None where the model has none."""
        before = self._ids(batch)[:, :-1]
        if not before.shape[1]:
            return None
        found = getattr(self.teacher.model(input_ids=before, use_cache=True), "past_key_values", None)
        return found if isinstance(found, Cache) else None

    @torch.inference_mode()
    def _can_continue_from_cache(self) -> bool:
        """Whether, for the first batch with a cache, a pass from the cache agrees with a pass over whole prompts."""
        for batch, cache in zip(self.batches, self._caches, strict=True):
            if cache is None:
                continue
            drawn = torch.randn(len(batch), self.teacher.d_model, generator=torch.Generator().manual_seed(0))
            try:
                whole, short = (self._next_tokens(batch, held, drawn) for held in (None, cache))
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
                return False
            return bool(_divergence(whole, short).abs().max() < SAME_KL)
        return False

    def _next_tokens(self, batch: NDArray[np.intp], cache: Cache | None, vectors: Tensor | None) -> Tensor:
        """Next-token log-probabilities of a batch, ``[batch, vocabulary]``, float32."""
        ids = self._ids(batch)

        def replace_last(stream: Tensor) -> Tensor:
            return torch.cat([stream[:, :-1], vectors[:, None].to(stream)], 1)  # type: ignore[index]

        with ExitStack() as stack:
            if vectors is not None:
                stack.enter_context(at_block(self.teacher, self.layer, replace_last))
            if cache is not None:
                ids, cache = ids[:, -1:], copy.deepcopy(cache)  # the model appends to it
                if vectors is not None:
                    stack.enter_context(skipped(self.teacher.blocks[: self.layer]))
            return self.teacher.logits(ids, cache=cache)[:, -1].log_softmax(-1)

    @torch.inference_mode()
    def kl(self, vectors: Tensor) -> NDArray[np.float64]:
        """Divergence in nats, ``[concepts]``, that vectors ``[concepts, d_model]``, not centred, cause."""
        found = np.empty(len(self.prompts))
        for batch, cache in zip(self.batches, self._caches, strict=True):
            other = self._next_tokens(batch, cache, vectors[batch]).cpu()
            found[batch] = _divergence(self.true[batch], other).double().numpy()
        return found


def _divergence(true: Tensor, other: Tensor) -> Tensor:
    return (true.exp() * (true - other)).sum(-1)


def kl_recovered(kl: NDArray[np.float64], of_mean: NDArray[np.float64]) -> float:
    """Share of the mean vector's divergence that the student removes, ``1 - KL(student) / KL(mean)``."""
    return float(1 - kl.mean() / of_mean.mean())


def recovered_interval(kl: NDArray[np.float64], of_mean: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of `kl_recovered` over concepts; ``kl`` is ``[seeds, N]``, ``of_mean`` ``[N]``."""
    draw = np.random.default_rng(0)
    values = []
    for _ in range(BOOTSTRAPS):
        columns, rows = draw.integers(kl.shape[1], size=kl.shape[1]), draw.integers(len(kl), size=len(kl))
        values.append(1 - kl[rows][:, columns].mean() / of_mean[columns].mean())
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
