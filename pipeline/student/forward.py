"""Forward passes of trained students in NumPy, the counterparts of those in `pipeline.training`.

Shapes: ``n`` texts. Parameters have no member axis. Folded features contain the first linear map already: the
parameters lack it, and the inputs are its output. A block's map may be a product of two (`low_rank_versions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.student.lookup import FloatArray

Parameters = Mapping[str, FloatArray]
FIRST_MAPS = ("in.weight", "skip.weight", "weight")
HEAD_DIM = 32  # of a transformer's attention
NORM_EPSILON = 1e-5


def first_map(parameters: Parameters) -> FloatArray | None:
    """Find the linear map, ``[features, width]``, that is the student's only use of its features; None without one."""
    if "support" in parameters:  # a kernel compares features
        return None
    maps = [parameters[name] for name in FIRST_MAPS if name in parameters]
    return np.concatenate(maps, 1) if maps else None


def without_first_map(parameters: Parameters) -> dict[str, FloatArray]:
    """Select the parameters after the first map."""
    return {name: value for name, value in parameters.items() if name not in FIRST_MAPS}


def low_rank_versions(parameters: Parameters, ranks: Iterable[int]) -> Iterator[dict[str, FloatArray]]:
    """Replace the maps of a residual MLP's blocks by the nearest products ``[hidden, rank] @ [rank, hidden]``."""
    # The truncated singular value decomposition is nearest (Eckart and Young, 1936).
    blocks = [name for name in parameters if name.startswith("block") and name.endswith(".weight")]
    parts = {name.removesuffix(".weight"): np.linalg.svd(parameters[name], full_matrices=False) for name in blocks}
    for rank in ranks:
        version = {name: value for name, value in parameters.items() if name not in blocks}
        for block, (left, strengths, right) in parts.items():
            root = np.sqrt(strengths[:rank])
            version |= {f"{block}.left": left[:, :rank] * root, f"{block}.right": root[:, None] * right[:rank]}
        yield version


def gelu(x: FloatArray) -> FloatArray:
    """``x`` times the normal distribution function of ``x`` (Hendrycks and Gimpel, 2016), to 1e-6."""
    # The function is 7.1.26 of Abramowitz and Stegun (1964): SciPy's takes a quarter of a second to load.
    z = np.abs(x)
    z *= np.float32(np.sqrt(0.5))
    t = z * np.float32(0.3275911)
    t += np.float32(1)
    np.reciprocal(t, out=t)
    tail = t * np.float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += np.float32(coefficient)
        tail *= t
    np.square(z, out=z)
    np.negative(z, out=z)
    tail *= np.exp(z, out=z)
    tail *= np.float32(0.5)  # probability above |x|
    tail *= np.abs(x, out=z)
    output: FloatArray = np.maximum(x, np.float32(0), out=z)
    output -= tail
    return output


def mlp(parameters: Parameters, inputs: FloatArray, activation: Callable[[Any], Any] = gelu) -> FloatArray:
    """A residual MLP, ``[n, features]`` to ``[n, d_model]``: `pipeline.training.mlp`; also of torch's tensors."""
    weight = first_map(parameters)
    first: FloatArray = inputs if weight is None else inputs @ weight  # [n, hidden] or [n, hidden + d_model]
    width = parameters["out.weight"].shape[0]
    hidden: FloatArray = first[:, :width] + parameters["in.bias"]
    for block in range(_blocks(parameters, ".bias")):
        name = f"block{block}"
        maps = [parameters[f"{name}.{side}"] for side in ("weight", "left", "right") if f"{name}.{side}" in parameters]
        change = hidden
        for factor in maps:
            change = change @ factor
        hidden += activation(change + parameters[f"{name}.bias"])
    output: FloatArray = hidden @ parameters["out.weight"]
    output += parameters["out.bias"]
    if first.shape[1] > width:
        output += first[:, width:]
    return output


def _blocks(parameters: Parameters, suffix: str) -> int:
    """Number of blocks, of which each has one parameter with that suffix."""
    return sum(name.startswith("block") and name.endswith(suffix) for name in parameters)


def linear(parameters: Parameters, inputs: FloatArray) -> FloatArray:
    """A linear map, ``[n, features]`` to ``[n, d_model]``: `pipeline.training.closed_form`."""
    return inputs @ parameters["weight"] if "weight" in parameters else inputs


def kernel(parameters: Parameters, inputs: FloatArray) -> FloatArray:
    """Kernel ridge regression, ``[n, features]`` to ``[n, d_model]``: `pipeline.training.closed_form`."""
    support = parameters["support"]  # [N, features]
    squares = np.square(inputs).sum(1)[:, None] + np.square(support).sum(1) - 2 * (inputs @ support.T)  # [n, N]
    similarity = np.exp(-parameters["width"].reshape(()) * squares.clip(min=0))
    output: FloatArray = similarity @ parameters["weight"] + inputs @ parameters["skip.weight"]
    return output


def transformer(parameters: Parameters, inputs: FloatArray) -> FloatArray:
    """A tiny transformer, ``[n, T * width]`` to ``[n, d_model]``: `pipeline.training.transformer`."""
    tokens = len(parameters["positions"])
    embedded = inputs.reshape(len(inputs), tokens, -1)
    is_token = (embedded != 0).any(-1)  # [n, T]
    stream: FloatArray = embedded @ parameters["in.weight"] if "in.weight" in parameters else embedded
    stream = stream + parameters["positions"]  # [n, T, hidden]
    for block in range(_blocks(parameters, ".merge.weight")):
        name = f"block{block}"
        mixed = _norm(stream) @ parameters[f"{name}.attention.weight"]
        query, key, value = mixed.reshape(*stream.shape[:2], 3, -1, HEAD_DIM).transpose(2, 0, 3, 1, 4)
        scores = query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(HEAD_DIM))  # [n, heads, T, T]
        scores = np.where(is_token[:, None, None], scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights @ value / weights.sum(-1, keepdims=True)
        stream = stream + attended.swapaxes(1, 2).reshape(stream.shape) @ parameters[f"{name}.merge.weight"]
        up = _norm(stream) @ parameters[f"{name}.up.weight"] + parameters[f"{name}.up.bias"]
        stream = stream + gelu(up) @ parameters[f"{name}.down.weight"]
    output: FloatArray = stream[:, -1] @ parameters["out.weight"] + parameters["out.bias"]
    return output


def _norm(values: FloatArray) -> FloatArray:
    centred = values - values.mean(-1, keepdims=True)
    normed: FloatArray = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(NORM_EPSILON))
    return normed


FORWARD: dict[str, Callable[[Parameters, FloatArray], FloatArray]] = {
    "mlp": mlp,
    "transformer": transformer,
    "ridge": linear,
    "kernel": kernel,
    "truncated": linear,
}
