"""A tiny transformer over the concept's token embeddings, as a stack of members of one shape.

Pre-norm blocks whose maps back into the stream start at zero, as in `mlp`; the last position answers. Tokens are
right-aligned, so that the last one is always in the same place.

``S`` members, ``B`` concepts, ``T`` tokens. Every parameter has the member axis first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.mlp import Parameters, uniform
from pipeline.training.regularisation import DropoutMasks, add_with_dropout

HEAD_DIM = 32
DROPOUT_SITES = 2  # of a block


def init(tokens: int, width: int, outputs: int, hidden_dim: int, layers: int, generator: torch.Generator) -> Parameters:
    """Random parameters of one member, as `mlp.init`; ``width`` of a token, ``hidden_dim`` a multiple of `HEAD_DIM`."""
    parameters = {"in.weight": uniform(width, hidden_dim, generator), "positions": torch.zeros(tokens, hidden_dim)}
    for block in range(layers):
        parameters |= {
            f"block{block}.attention.weight": uniform(hidden_dim, 3 * hidden_dim, generator),
            f"block{block}.merge.weight": torch.zeros(hidden_dim, hidden_dim),
            f"block{block}.up.weight": uniform(hidden_dim, 2 * hidden_dim, generator),
            f"block{block}.up.bias": torch.zeros(1, 2 * hidden_dim),
            f"block{block}.down.weight": torch.zeros(2 * hidden_dim, hidden_dim),
        }
    return parameters | {"out.weight": uniform(hidden_dim, outputs, generator), "out.bias": torch.zeros(1, outputs)}


def apply(parameters: Parameters, inputs: Tensor, masks: DropoutMasks | None = None) -> Tensor:
    """Predict: ``[S, B, T * width]``, embeddings end to end and zeros where no token is, to ``[S, B, d_model]``."""
    tokens, hidden_dim = parameters["positions"].shape[-2:]
    members, batch = inputs.shape[:2]
    width = parameters["in.weight"].shape[-2]
    blocks = sum(name.endswith(".merge.weight") for name in parameters)
    is_token = (inputs.view(members, batch, tokens, width) != 0).any(-1)  # [S, B, T]
    # A row that pads a batch has no token; attention over nothing would be undefined.
    seen = (is_token | ~is_token.any(-1, keepdim=True))[:, :, None, None, :]  # [S, B, 1, 1, T]

    def linear(name: str, values: Tensor) -> Tensor:
        flat = values.reshape(members, batch * tokens, -1)  # [S, B T, rows]
        return torch.bmm(flat, parameters[name]).view(members, batch, tokens, -1)

    def with_change(stream: Tensor, change: Tensor, site: int) -> Tensor:
        return add_with_dropout(stream.flatten(1, 2), change.flatten(1, 2), masks, site).view_as(stream)

    kept = inputs if masks is None else inputs * masks.inputs
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
