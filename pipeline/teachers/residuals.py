"""The truncated, prefix-shared forward pass: a teacher's residual stream at chosen blocks, and no other arithmetic.

A token tree runs through the teacher's own blocks as one row of tokens without padding. Only attention is exchanged,
through the interface of `transformers`: every token attends to its ancestors in the tree and to the common prefix,
whose keys and values were computed once. Nothing past the deepest block runs, and no logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.errors import InputError
from pipeline.teachers.find import Teacher
from pipeline.teachers.token_tree import TokenTree

TREE = "token-tree"
# Arguments of attention that change nothing in a pass without dropout and padding, or that the positions contain.
HARMLESS = {
    "dropout", "is_causal", "position_ids", "output_attentions", "deterministic", "use_cache", "cache_position",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_router_logits",
}  # fmt: skip


class _Stop(Exception):  # noqa: N818 (not an error)
    """Ends the forward pass once the deepest block asked for has been read."""


@contextmanager
def _reading(teacher: Teacher, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Hook the blocks to keep the residual stream at ``layers``, before the final norm, and to stop at the deepest."""
    read: dict[int, Tensor] = {}

    def keep(layer: int, value: Any) -> None:
        if layer in layers:
            if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[-1] != teacher.d_model:
                found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"--teacher {teacher.name}: block {layer} passes on {found}, not one residual stream that is "
                    f"{teacher.d_model} wide"
                )
            read[layer] = value
        if layer == layers[-1]:
            raise _Stop

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Any:
        # A block returns its residual stream, alone or first in a tuple or list, depending on the architecture.
        return lambda _module, _args, output: keep(layer, output[0] if isinstance(output, (tuple, list)) else output)

    with ExitStack() as hooks, suppress(_Stop), torch.inference_mode():
        hooks.enter_context(teacher.blocks[0].register_forward_pre_hook(before_first, with_kwargs=True))
        for number, block in enumerate(teacher.blocks, start=1):
            hooks.enter_context(block.register_forward_hook(after(number)))
        yield read
        raise InputError(f"--teacher {teacher.name}: its blocks do not all run, and cannot be read")


def residuals(teacher: Teacher, token_ids: Tensor, layers: Sequence[int]) -> Tensor:
    """Run the plain forward pass up to the deepest of ``layers``, for prompts of one length.

    Args:
        teacher: the model.
        token_ids: ``[batch, tokens]``, without padding.
        layers: block numbers, ascending; 0 is the embedding output.

    Returns:
        ``[layers, batch, tokens, d_model]``.

    Raises:
        InputError: the blocks do not return one residual stream.
    """
    with _reading(teacher, layers) as read:
        teacher.model(input_ids=token_ids.to(teacher.device), use_cache=False)
    for layer, stream in read.items():
        if stream.shape[:2] != token_ids.shape:
            raise InputError(f"--teacher {teacher.name}: block {layer} passes on no stream of prompts by tokens")
    return torch.stack([read[layer].to(teacher.device) for layer in layers])


class TreeUnsupported(Exception):  # noqa: N818 (not an error)
    """The model does more than the tree's attention computes; prompts must run whole."""


@dataclass(frozen=True)
class _Running:
    """The tree that runs through the teacher, for its attention."""

    prefix: Mapping[int, tuple[Tensor, Tensor]]  # by layer: keys and values, [1, heads, prefix, head_dim]
    levels: Sequence[tuple[int, Tensor]]
    longest: int  # tokens of the longest prompt
    called: list[int] = field(default_factory=list)  # layers whose attention ran


_running: ContextVar[_Running | None] = ContextVar("running", default=None)


def _tree_attention(
    module: Any,
    query: Tensor,  # [1, heads, nodes, head_dim], with positions applied
    key: Tensor,  # [1, key heads, nodes, head_dim], each serving heads / key heads query heads
    value: Tensor,  # [1, key heads, nodes, value head_dim]
    mask: Tensor | None,  # a model that makes its own mask is refused
    scaling: float | None = None,  # of the scores; 1 / sqrt(head_dim) by default
    sliding_window: int | None = None,  # tokens that a token sees, itself included; all by default
    softcap: float | None = None,  # bound of the scores, where the architecture has one (Gemma 2)
    s_aux: Tensor | None = None,  # [heads], the score of each head's sink, where the architecture has one (gpt-oss)
    **others: object,
) -> tuple[Tensor, None]:
    """Attention ``[1, nodes, heads, value head_dim]`` of every node to the prefix and to its ancestors, in float32."""
    tree = _running.get()
    assert tree is not None
    unknown = [name for name, given in others.items() if name not in HARMLESS and given is not None]
    if mask is not None or unknown:
        raise TreeUnsupported(f"attention takes {', '.join(unknown) or 'a mask of its own'}")
    tree.called.append(module.layer_idx)
    if sliding_window is None and tree.longest > _window(module):
        raise TreeUnsupported("a window that attention is not given")
    heads, nodes, head_dim = query.shape[1:]
    groups = key.shape[1]
    scaling = head_dim**-0.5 if scaling is None else scaling
    q = query[0].view(groups, heads // groups, nodes, head_dim).permute(2, 0, 1, 3).float() * scaling  # [n, g, h, d]
    k, v = key[0].transpose(0, 1).float(), value[0].transpose(0, 1).float()  # [nodes, groups, head_dim]
    prefix_scores, prefix_values, length = None, None, 0
    if tree.prefix:
        prefix_keys, prefix_values = (part[0].to(q) for part in tree.prefix[module.layer_idx])  # [g, prefix, d]
        length = prefix_keys.shape[1]
        flat = q.transpose(0, 1).reshape(groups, -1, head_dim)
        prefix_scores = (flat @ prefix_keys.mT).view(groups, nodes, -1, length).transpose(0, 1)  # [n, g, h, prefix]
    sink = None if s_aux is None else s_aux.float().view(groups, -1)  # [g, h]
    on_prefix, on_branch = [], []
    for start, way in tree.levels:
        here = slice(start, start + len(way))
        scores = torch.einsum("nghd,ntgd->nght", q[here], k[way])
        if prefix_scores is not None:
            scores = torch.cat([prefix_scores[here], scores], -1)  # [n, g, h, prefix + tokens since]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sliding_window is not None and scores.shape[-1] > sliding_window:
            scores[..., : scores.shape[-1] - sliding_window] = -torch.inf
        if sink is None:
            weights = scores.softmax(-1)
        else:  # a share of the attention without a value
            weights = torch.cat([scores, sink[:, :, None].expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
        on_prefix.append(weights[..., :length])
        on_branch.append(torch.einsum("nght,ntgd->nghd", weights[..., length:], v[way]))
    result = torch.cat(on_branch)  # [nodes, groups, heads of a group, head_dim]
    if prefix_values is not None:
        flat = torch.cat(on_prefix).transpose(0, 1).reshape(groups, -1, length)
        result += (flat @ prefix_values).view(groups, nodes, -1, v.shape[-1]).transpose(0, 1)
    return result.reshape(1, nodes, heads, -1).to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register(TREE, _tree_attention)


def _window(module: Any) -> float:
    """Tokens that a layer of sliding or chunked attention sees, by its configuration; infinite for full attention."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and "full" in kinds[module.layer_idx]:
        return math.inf
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((limit for limit in limits if limit), default=math.inf)


def _rotary_limit(config: Any) -> float:
    """Length of the longest prompt up to which a pass's rotary frequencies do not depend on that length."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [own for own in rotary.values() if isinstance(own, dict)] or [rotary]  # by kind of layer, or one for all
    if not any(own.get("rope_type") in ("longrope", "dynamic") for own in kinds):
        return math.inf
    limits = [own.get("original_max_position_embeddings") for own in kinds]
    limits += [getattr(config, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    return min((limit for limit in limits if limit), default=0)


def can_run_trees(teacher: Teacher) -> bool:
    """Whether the model's attention can be exchanged, and no convolution runs over the tokens."""
    can_exchange = getattr(teacher.model, "_can_set_attn_implementation", lambda: True)
    modules = (module for block in teacher.blocks for module in block.modules())
    return can_exchange() and not any(isinstance(module, nn.Conv1d) for module in modules)


def prefix_states(teacher: Teacher, token_ids: Sequence[int], layers: Sequence[int]) -> dict[int, tuple[Any, Any]]:
    """Keys and values of the common prefix, by layer: ``[1, key heads, prefix, head_dim]`` each."""
    if not token_ids:
        return {}
    cache: Any = DynamicCache()
    with _reading(teacher, layers):
        teacher.model(input_ids=torch.tensor([token_ids], device=teacher.device), past_key_values=cache, use_cache=True)
    return {number: (layer.keys, layer.values) for number, layer in enumerate(cache.layers)}


def tree_residuals(
    teacher: Teacher, tree: TokenTree, prefix: Mapping[int, tuple[Tensor, Tensor]], layers: Sequence[int]
) -> list[Tensor]:
    """Run a token tree through the teacher.

    Args:
        teacher: the model.
        tree: the prompts after their common prefix.
        prefix: keys and values of that prefix, from `prefix_states`.
        layers: block numbers, ascending; 0 is the embedding output.

    Returns:
        For each layer ``[nodes, d_model]``.

    Raises:
        TreeUnsupported: a pass of the tree differs from those of its prompts.
    """
    device, model, longest = teacher.device, teacher.model, int(tree.depths.max()) + 1
    if longest > _rotary_limit(model.config.get_text_config()):
        raise TreeUnsupported("rotary positions that change with the longest prompt of a pass")
    running = _Running(prefix, [(start, _to(way, device)) for start, way in tree.levels], longest)
    token_ids, depths = _to(tree.token_ids, device)[None], _to(tree.depths, device)[None]  # [1, nodes]
    own_attention = model.config._attn_implementation
    token = _running.set(running)
    try:
        model.set_attn_implementation(TREE)
        with _reading(teacher, layers) as read:
            model(input_ids=token_ids, position_ids=depths, use_cache=False)
    finally:
        _running.reset(token)
        model.set_attn_implementation(own_attention)
    if sorted(running.called) != list(range(layers[-1])):
        raise TreeUnsupported("blocks without attention, or with attention that cannot be exchanged")
    return [read[layer][0].to(device) for layer in layers]


def _to(values: Any, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def flops_per_token(teacher: Teacher, layers: Sequence[int]) -> float:
    """Floating-point operations of a token up to the deepest of ``layers``: two per weight of a matrix, all experts."""
    blocks = teacher.blocks[: layers[-1]]
    return 2.0 * sum(weight.numel() for block in blocks for weight in block.parameters() if weight.dim() > 1)
