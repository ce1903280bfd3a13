"""What trained students make of what they read, in NumPy: the forward passes of `pipeline.students` without torch.

``n`` texts. Parameters have no member axis. Where a reading has the first linear map in it already, the parameters
lack it, and what comes in is what that map gives. A block's map may be a product of two (`low_rank_versions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from pipeline.student.lookup import FloatArray

Parameters = Mapping[str, FloatArray]
HEAD_DIM = 32  # of a transformer's attention
NORM_EPSILON = 1e-5


def first_map(parameters: Parameters) -> FloatArray | None:
    """The linear map, ``[features, width]``, that is all that a student does with its features; None without one."""
    if "support" in parameters:  # a kernel compares features
        return None
    names = [name for name in ("in.weight", "skip.weight", "weight") if name in parameters]
    return np.concatenate([parameters[name] for name in names], 1) if names else None


def without_first_map(parameters: Parameters) -> dict[str, FloatArray]:
    """The parameters behind the first map."""
    return {name: value for name, value in parameters.items() if name not in ("in.weight", "skip.weight", "weight")}


def low_rank_versions(parameters: Parameters, ranks: Iterable[int]) -> Iterator[dict[str, FloatArray]]:
    """A residual MLP whose blocks' maps are products of two, ``[hidden, rank]`` and ``[rank, hidden]``, rank by rank.

    Of all of that rank they are nearest to what they replace (Eckart and Young, 1936).
    """
    blocks = [name for name in parameters if name.startswith("block") and name.endswith(".weight")]
    parts = {name.removesuffix(".weight"): np.linalg.svd(parameters[name], full_matrices=False) for name in blocks}
    for rank in ranks:
        thin = {name: value for name, value in parameters.items() if name not in blocks}
        for block, (left, strengths, right) in parts.items():
            root = np.sqrt(strengths[:rank])
            thin |= {f"{block}.left": left[:, :rank] * root, f"{block}.right": root[:, None] * right[:rank]}
        yield thin


def normal_cdf(x: FloatArray) -> FloatArray:
    """The standard normal distribution function, to 1e-7 (Abramowitz and Stegun, 1964, 7.1.26).

    In float32 and without SciPy, which takes a quarter of a second to load.
    """
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.float32(1.061405429) * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series += np.float32(coefficient)
        series *= t
    np.square(z, out=z)
    np.negative(z, out=z)
    series *= np.exp(z, out=z)
    series *= np.float32(0.5)  # the probability beyond |x|
    return np.where(x > 0, np.float32(1) - series, series)


def gelu(x: FloatArray) -> FloatArray:
    """``x`` times the normal distribution function of ``x`` (Hendrycks and Gimpel, 2016)."""
    return x * normal_cdf(x)


def mlp(parameters: Parameters, read: FloatArray) -> FloatArray:
    """A residual MLP: ``[n, features]`` to ``[n, d_model]``; see `pipeline.training.mlp`."""
    weight = first_map(parameters)
    first: FloatArray = read if weight is None else read @ weight  # [n, hidden] or [n, hidden + d_model]
    width = parameters["out.weight"].shape[0]
    hidden: FloatArray = first[:, :width] + parameters["in.bias"]
    for block in range(sum(name.startswith("block") and name.endswith(".bias") for name in parameters)):
        name = f"block{block}"
        if f"{name}.left" in parameters:
            change: FloatArray = hidden @ parameters[f"{name}.left"]
            change = change @ parameters[f"{name}.right"]
        else:
            change = hidden @ parameters[f"{name}.weight"]
        hidden += gelu(change + parameters[f"{name}.bias"])
    answer: FloatArray = hidden @ parameters["out.weight"]
    answer += parameters["out.bias"]
    if first.shape[1] > width:
        answer += first[:, width:]
    return answer


def linear(parameters: Parameters, read: FloatArray) -> FloatArray:
    """A linear map: ``[n, features]`` to ``[n, d_model]``; see `pipeline.training.ridge`."""
    return read @ parameters["weight"] if "weight" in parameters else read


def kernel(parameters: Parameters, read: FloatArray) -> FloatArray:
    """Kernel ridge regression: ``[n, features]`` to ``[n, d_model]``; see `pipeline.training.kernel`."""
    support = parameters["support"]  # [N, features]
    squares = np.square(read).sum(1)[:, None] + np.square(support).sum(1) - 2 * (read @ support.T)  # [n, N]
    near = np.exp(-parameters["width"].reshape(()) * squares.clip(min=0))
    answer: FloatArray = near @ parameters["weight"] + read @ parameters["skip.weight"]
    return answer


def transformer(parameters: Parameters, read: FloatArray) -> FloatArray:
    """A tiny transformer: ``[n, T * width]`` to ``[n, d_model]``; see `pipeline.training.transformer`."""
    tokens = len(parameters["positions"])
    inputs = read.reshape(len(read), tokens, -1)
    there = (inputs != 0).any(-1)  # [n, T]
    stream: FloatArray = inputs @ parameters["in.weight"] if "in.weight" in parameters else inputs
    stream = stream + parameters["positions"]  # [n, T, hidden]
    for block in range(sum(name.endswith(".merge.weight") for name in parameters)):
        name = f"block{block}"
        mixed = _norm(stream) @ parameters[f"{name}.attention.weight"]
        query, key, value = mixed.reshape(*stream.shape[:2], 3, -1, HEAD_DIM).transpose(2, 0, 3, 1, 4)
        scores = query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(HEAD_DIM))  # [n, heads, T, T]
        scores = np.where(there[:, None, None], scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights @ value / weights.sum(-1, keepdims=True)
        stream = stream + attended.swapaxes(1, 2).reshape(stream.shape) @ parameters[f"{name}.merge.weight"]
        up = _norm(stream) @ parameters[f"{name}.up.weight"] + parameters[f"{name}.up.bias"]
        stream = stream + gelu(up) @ parameters[f"{name}.down.weight"]
    answer: FloatArray = stream[:, -1] @ parameters["out.weight"] + parameters["out.bias"]
    return answer


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
