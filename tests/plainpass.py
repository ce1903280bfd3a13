"""The plain forward pass, without any code of ours: one prompt at a time, its stream taken from the model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAME = 1e-4  # of a vector's norm


@dataclass(frozen=True)
class Plain:
    """A model as the library loads it.

    Attributes:
        model: the model.
        blocks: the name of its list of blocks.
    """

    model: Any
    blocks: str

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.model.get_submodule(self.blocks))

    def streams(self, prompts: Sequence[Sequence[int]], layers: Sequence[int]) -> np.ndarray:
        """The residual stream at each prompt's last token, ``[prompts, layers, d_model]``; 0 is what comes in."""
        read = []
        for ids in prompts:
            calls = self._run(ids)
            streams = [calls[0][0], *(output for _, output in calls)]
            read.append(torch.stack([streams[layer][0, -1].float() for layer in layers]))
        return torch.stack(read).numpy().astype(np.float64)

    def is_causal(self, ids: Sequence[int]) -> bool:
        """Whether no position sees the one behind it."""
        seen = [self._run([*ids[:-1], last])[-1][1][0, :-1].float() for last in (ids[-1], ids[-1] - 1)]
        return bool((seen[0] - seen[1]).norm() / seen[0].norm() < SAME)

    def _run(self, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What each block was given and what it returned."""
        with _watching(dict(enumerate(self.model.get_submodule(self.blocks)))) as calls, torch.inference_mode():
            self.model(input_ids=torch.tensor([ids]), use_cache=False)
        return [calls[number] for number in range(self.depth)]


def blocks_of(model: Any, ids: Sequence[int]) -> str:
    """The name of the list whose members returned what the library itself calls hidden states.

    The last block's state is normed by most models, so it is left out.

    Raises:
        LookupError: there is no such list.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members = {(name, number): one for name, many in lists.items() for number, one in enumerate(many)}
    with _watching(members) as calls, torch.inference_mode():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states

    def is_state(value: object) -> bool:
        return any(isinstance(value, Tensor) and torch.equal(value, state) for state in states or ())

    def gave_them(name: str) -> bool:
        ran = [calls.get((name, number), (None, None))[1] for number in range(len(lists[name]))]
        return len(ran) > 1 and all(map(is_state, ran[:-1])) and ran[-1] is not None

    found = max(filter(gave_them, lists), key=lambda name: len(lists[name]), default=None)
    if found is None:
        raise LookupError("no list of blocks gives the hidden states that the library names")
    return found


@contextmanager
def _watching(modules: dict[Any, nn.Module]) -> Iterator[dict[Any, tuple[Any, Any]]]:
    """What each module was given and what it returned, the last time that it ran."""
    calls: dict[Any, tuple[Any, Any]] = {}

    def hook(key: Any) -> Callable[..., None]:
        def keep(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            calls[key] = given, output[0] if isinstance(output, (tuple, list)) else output

        return keep

    hooks = [module.register_forward_hook(hook(key), with_kwargs=True) for key, module in modules.items()]
    try:
        yield calls
    finally:
        for one in hooks:
            one.remove()
