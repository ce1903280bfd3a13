"""A tiny transformer over the concept's token embeddings, as a stack of members of one shape.

Pre-norm blocks whose way back into the stream starts at zero, as in `mlp`; the last position answers. Tokens stand at
the right end, so that the last one is always in the same place.

``S`` members, ``B`` concepts, ``T`` tokens. Every parameter has the member axis first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.dropout import Dropped, add
from pipeline.training.mlp import Parameters

HEAD_DIM = 32
DROPOUT_SITES = 2  # of a block, where hidden units are dropped


def init(tokens: int, width: int, outputs: int, hidden_dim: int, layers: int, generator: torch.Generator) -> Parameters:
    """Parameters of one member, without the member axis.

    Args:
        tokens: T.
        width: of a token embedding.
        outputs: d_model.
        hidden_dim: width of the stream, a multiple of `HEAD_DIM`.
        layers: blocks of attention and MLP.
        generator: source of the random start, on the CPU so that it is the same on every device.
    """

    def linear(rows: int, columns: int) -> Tensor:
        return (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(rows)

    parameters = {"in.weight": linear(width, hidden_dim), "positions": torch.zeros(tokens, hidden_dim)}
    for block in range(layers):
        parameters |= {
            f"block{block}.attention.weight": linear(hidden_dim, 3 * hidden_dim),
            f"block{block}.merge.weight": torch.zeros(hidden_dim, hidden_dim),
            f"block{block}.up.weight": linear(hidden_dim, 2 * hidden_dim),
            f"block{block}.up.bias": torch.zeros(1, 2 * hidden_dim),
            f"block{block}.down.weight": torch.zeros(2 * hidden_dim, hidden_dim),
        }
    return parameters | {"out.weight": linear(hidden_dim, outputs), "out.bias": torch.zeros(1, outputs)}


def apply(parameters: Parameters, inputs: Tensor, dropped: Dropped | None = None) -> Tensor:
    """Predict.

    Args:
        parameters: each ``[S, rows, columns]``.
        inputs: ``[S, B, T * width]``, the tokens' embeddings end to end; zeros stand where there is no token.
        dropped: what takes part in this step of training.

    Returns:
        ``[S, B, d_model]``.
    """
    tokens, hidden_dim = parameters["positions"].shape[-2:]
    members, batch = inputs.shape[:2]
    width = parameters["in.weight"].shape[-2]
    blocks = sum(name.endswith(".merge.weight") for name in parameters)
    there = (inputs.view(members, batch, tokens, width) != 0).any(-1)  # [S, B, T]
    # A row that pads a batch has no token at all; attention over nothing would be undefined.
    seen = (there | ~there.any(-1, keepdim=True))[:, :, None, None, :]  # [S, B, 1, 1, T]

    def linear(name: str, values: Tensor) -> Tensor:
        flat = values.reshape(members, batch * tokens, -1)  # [S, B T, rows]
        return torch.bmm(flat, parameters[name]).view(members, batch, tokens, -1)

    def with_change(stream: Tensor, change: Tensor, site: int) -> Tensor:
        return add(stream.flatten(1, 2), change.flatten(1, 2), dropped, site).view_as(stream)

    kept = inputs if dropped is None else inputs * dropped.inputs
    stream = linear("in.weight", kept.view(members, batch, tokens, width))  # [S, B, T, hidden]
    stream = stream + parameters["positions"][:, None]
    for block in range(blocks):
        name = f"block{block}"
        mixed = linear(f"{name}.attention.weight", _norm(stream)).view(members, batch, tokens, 3, -1, HEAD_DIM)
        query, key, value = mixed.permute(3, 0, 1, 4, 2, 5)  # [S, B, heads, T, HEAD_DIM] each
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        attended = attended.transpose(2, 3).reshape(members, batch, tokens, hidden_dim)
        stream = with_change(stream, linear(f"{name}.merge.weight", attended), 2 * block)
        up = linear(f"{name}.up.weight", _norm(stream)) + parameters[f"{name}.up.bias"][:, None]
        stream = with_change(stream, linear(f"{name}.down.weight", F.gelu(up)), 2 * block + 1)
    return torch.baddbmm(parameters["out.bias"], stream[:, :, -1], parameters["out.weight"])  # [S, B, d_model]


def _norm(values: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:])
