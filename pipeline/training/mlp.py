"""A residual MLP, as a stack of members of one shape.

A linear map into the hidden stream, ``layers`` residual blocks ``h + dropout(gelu(h W + b))`` that start at zero, and a
linear map out. A student thus begins as a low-rank linear map, the strong part of the problem, and learns the
curvature on top (zero start as in fixup: Zhang, Dauphin and Ma, 2019). The optional linear skip from inputs to outputs
(``skip.weight``) starts as the ridge regression; the linear map out then starts at zero.

``S`` members, ``B`` concepts. Every parameter has the member axis first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.regularisation import DropoutMasks, add_with_dropout

DROPOUT_SITES = 1  # of a block
Parameters = dict[str, Tensor]


def init(inputs: int, outputs: int, hidden_dim: int, layers: int, generator: torch.Generator) -> Parameters:
    """Random parameters of one member, without the member axis; on the CPU, so that all devices start alike."""
    parameters = {"in.weight": uniform(inputs, hidden_dim, generator), "in.bias": torch.zeros(1, hidden_dim)}
    for block in range(layers):
        parameters[f"block{block}.weight"] = torch.zeros(hidden_dim, hidden_dim)
        parameters[f"block{block}.bias"] = torch.zeros(1, hidden_dim)
    return parameters | {"out.weight": uniform(hidden_dim, outputs, generator), "out.bias": torch.zeros(1, outputs)}


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random linear map, ``[rows, columns]``, uniform within 1 / sqrt(rows)."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(rows)


def apply(parameters: Parameters, inputs: Tensor, masks: DropoutMasks | None = None) -> Tensor:
    """Predict.

    Args:
        parameters: each ``[S, rows, columns]``. An exported student lacks ``in.weight`` and ``in.bias`` where its
            inputs contain them already; its blocks may be of lower rank (``left``, ``right``).
        inputs: ``[S, B, features]``.
        masks: dropout of this training step.

    Returns:
        ``[S, B, d_model]``.
    """
    blocks = sum(name.startswith("block") and name.endswith(".bias") for name in parameters)
    hidden = inputs if masks is None else inputs * masks.inputs
    if "in.weight" in parameters:
        hidden = torch.baddbmm(parameters["in.bias"], hidden, parameters["in.weight"])  # [S, B, hidden]
    elif "in.bias" in parameters:
        hidden = hidden + parameters["in.bias"]
    for block in range(blocks):
        bias, weight, read = parameters[f"block{block}.bias"], parameters.get(f"block{block}.weight"), hidden
        if weight is None:
            read, weight = torch.bmm(hidden, parameters[f"block{block}.left"]), parameters[f"block{block}.right"]
        hidden = add_with_dropout(hidden, F.gelu(torch.baddbmm(bias, read, weight)), masks, block)
    answer = torch.baddbmm(parameters["out.bias"], hidden, parameters["out.weight"])  # [S, B, d_model]
    return answer if "skip.weight" not in parameters else torch.baddbmm(answer, inputs, parameters["skip.weight"])
