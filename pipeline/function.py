"""Do predicted vectors still work? The teacher goes on from them, and what it says next is compared.

A vector takes the place of the true activation at its block and position, and the rest of the teacher runs as usual.
`kl_recovered` compares next-token distributions: 1 for the true vector, 0 for the mean vector. It is the "loss
recovered" of sparse autoencoders with the mean in place of an ablation (Bricken et al., 2023, "Towards
monosemanticity").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.prompts import tokenize
from pipeline.teachers import Teacher

BATCH_TOKENS = 2048


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
def replaced(teacher: Teacher, layer: int, vectors: Tensor) -> Iterator[None]:
    """Put ``vectors`` ``[batch, d_model]`` in place of the last position's residual stream after block ``layer``."""

    def put(stream: Tensor) -> Tensor:
        changed = stream.clone()
        changed[:, -1] = vectors.to(stream)
        return changed

    with at_block(teacher, layer, put):
        yield


class Continuations:
    """What a teacher says after prompts, from its own activations or from others put in their place.

    Args:
        teacher: the model.
        concepts: what to put into the template.
        template: one that ends with ``{concept}`` or not; the last token's activation is replaced.
        layer: after which block.
    """

    def __init__(self, teacher: Teacher, concepts: Sequence[str], template: str, layer: int) -> None:
        self.teacher, self.layer = teacher, layer
        self.prompts = [prompt.token_ids for prompt in tokenize(teacher, concepts, template)]
        lengths = np.array([len(ids) for ids in self.prompts])
        self.batches = []  # of prompts of one length, so that none is padded
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            self.batches += np.array_split(rows, -(-len(rows) * int(length) // BATCH_TOKENS))
        self.true = self._log_probabilities(None)

    def _log_probabilities(self, vectors: Tensor | None) -> Tensor:
        """Of the next token, ``[concepts, vocabulary]``, in float32."""
        rows: list[Tensor] = [torch.empty(0)] * len(self.prompts)
        for batch in self.batches:
            ids = torch.tensor([self.prompts[row] for row in batch], device=self.teacher.device)
            with torch.inference_mode():
                if vectors is None:
                    logits = self._last_logits(ids)
                else:
                    with replaced(self.teacher, self.layer, vectors[torch.from_numpy(batch)]):
                        logits = self._last_logits(ids)
            for row, value in zip(batch, logits.float().log_softmax(-1).cpu(), strict=True):
                rows[row] = value
        return torch.stack(rows)

    def _last_logits(self, ids: Tensor) -> Tensor:
        last = self.teacher.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        weight = next(self.teacher.head.parameters())
        logits: Tensor = self.teacher.head(last.to(weight)).float()
        cap = getattr(self.teacher.model.config.get_text_config(), "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def kl(self, vectors: Tensor) -> NDArray[np.float64]:
        """Kullback-Leibler divergence from the teacher's own next-token distribution, in nats, one a concept.

        Args:
            vectors: ``[concepts, d_model]``, not centred.
        """
        changed = self._log_probabilities(vectors)
        divergence = (self.true.exp() * (self.true - changed)).sum(-1)
        return divergence.double().numpy()


def kl_recovered(kl: NDArray[np.float64], of_mean: NDArray[np.float64]) -> float:
    """Share of the mean vector's divergence that is gone: ``1 - KL(student) / KL(mean)``, over all concepts."""
    return float(1 - kl.mean() / of_mean.mean())


def recovered_interval(
    kl: NDArray[np.float64], of_mean: NDArray[np.float64], level: float = 0.95, samples: int = 2000
) -> tuple[float, float]:
    """Bootstrap interval of `kl_recovered` over concepts; ``kl`` is ``[seeds, N]``, ``of_mean`` ``[N]``."""
    draw = np.random.default_rng(0)
    values = []
    for _ in range(samples):
        columns, rows = draw.integers(kl.shape[1], size=kl.shape[1]), draw.integers(len(kl), size=len(kl))
        values.append(1 - kl[rows][:, columns].mean() / of_mean[columns].mean())
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
