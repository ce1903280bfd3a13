"""A residual MLP, as a stack of members of one shape.

A linear map into the hidden stream, ``layers`` residual blocks ``h + dropout(gelu(h W + b))`` that start at zero, and a
linear map out. A student thus begins as a low-rank linear map, the strong part of the problem, and learns
the curvature on top (fixup-style zero start: Zhang, Dauphin and Ma, 2019). A linear skip from inputs to outputs
(``skip.weight``), where there is one, starts as the ridge regression, and the rest then starts at zero.

``S`` members, ``B`` concepts. Every parameter has the member axis first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.dropout import Dropped, add

DROPOUT_SITES = 1  # of a block, where hidden units are dropped
Parameters = dict[str, Tensor]


def init(inputs: int, outputs: int, hidden_dim: int, layers: int, generator: torch.Generator) -> Parameters:
    """Parameters of one member, without the member axis.

    Args:
        inputs: number of features.
        outputs: d_model.
        hidden_dim: width of the hidden stream.
        layers: residual blocks.
        generator: source of the random start, on the CPU so that it is the same on every device.
    """

    def linear(rows: int, columns: int) -> Tensor:
        start = torch.rand(rows, columns, generator=generator) * 2 - 1  # [rows, columns]
        return start / math.sqrt(rows)

    parameters = {"in.weight": linear(inputs, hidden_dim), "in.bias": torch.zeros(1, hidden_dim)}
    for block in range(layers):
        parameters[f"block{block}.weight"] = torch.zeros(hidden_dim, hidden_dim)
        parameters[f"block{block}.bias"] = torch.zeros(1, hidden_dim)
    return parameters | {"out.weight": linear(hidden_dim, outputs), "out.bias": torch.zeros(1, outputs)}


def apply(parameters: Parameters, inputs: Tensor, dropped: Dropped | None = None) -> Tensor:
    """Predict.

    Args:
        parameters: each ``[S, rows, columns]``; without ``in.weight`` the inputs have gone through it already, without
            ``in.bias`` that is in them too.
        inputs: ``[S, B, features]``.
        dropped: what takes part in this step of training.

    Returns:
        ``[S, B, d_model]``.
    """
    blocks = sum(name.startswith("block") and name.endswith(".bias") for name in parameters)
    hidden = inputs if dropped is None else inputs * dropped.inputs
    if "in.weight" in parameters:
        hidden = torch.baddbmm(parameters["in.bias"], hidden, parameters["in.weight"])  # [S, B, hidden]
    elif "in.bias" in parameters:
        hidden = hidden + parameters["in.bias"]
    for block in range(blocks):
        bias, weight, read = parameters[f"block{block}.bias"], parameters.get(f"block{block}.weight"), hidden
        if weight is None:  # of lower rank, once it is trained
            read, weight = torch.bmm(hidden, parameters[f"block{block}.left"]), parameters[f"block{block}.right"]
        change = F.gelu(torch.baddbmm(bias, read, weight))
        hidden = add(hidden, change, dropped, block)
    answer = torch.baddbmm(parameters["out.bias"], hidden, parameters["out.weight"])  # [S, B, d_model]
    return answer if "skip.weight" not in parameters else torch.baddbmm(answer, inputs, parameters["skip.weight"])
