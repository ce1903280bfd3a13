"""Students in closed form: ridge regression and kernel ridge regression, with regularisation chosen on validation.

Training concepts are read in chunks, and no matrix of concepts x concepts is held where there are more concepts than
features or landmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import Subset
from pipeline.metrics import cosines

# In units of the mean eigenvalue of the features' Gram matrix, so that it does not depend on scale or size.
STRENGTHS = np.logspace(-4, 2, 49)
# Of the kernel: in units of its mean eigenvalue, and exponents at the mean squared distance of concepts.
KERNEL_STRENGTHS = np.logspace(-4, 1, 21)
KERNEL_WIDTHS = (0.2, 0.4, 0.8, 1.6)
LANDMARKS = 2000  # concepts at which a kernel is centred, at the most
MIN_EIGENVALUE = 1e-12  # share of the largest below which a direction counts as none
WELL_POSED = 8  # concepts per feature from which rounding to float32 moves the map by less than 1e-5
GRAM_BLOCK = 256  # columns of a Gram matrix computed at once, from the diagonal on
EIGEN_FLOPS = 10  # of an eigendecomposition, a cubed row, in operations at the rate of a product: measured
EXP_FLOPS = 160  # of an exponential, likewise
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fit:
    """A fitted student, with the regularisation that was chosen on validation."""

    parameters: dict[str, Tensor]  # without the member axis; `weight` maps to targets in units of the subset's scale
    strength: float
    val_cosine: float


@dataclass(frozen=True)
class ClosedForm:
    """A way to solve for a student."""

    solve: Callable[[Subset, torch.device], Fit]
    flops: Callable[[int, int, int, int], float]  # in float64, by training concepts, features, d_model and validation


@dataclass(frozen=True)
class Spectrum:
    """Ridge regression for all strengths: ``directions (values + strength)^-1 moments`` is the map, in float64."""

    values: Tensor  # [k], eigenvalues of the Gram matrix
    directions: Tensor  # [features, k], its eigenvectors
    moments: Tensor  # [k, d_model], products of inputs along the directions with the targets

    def weight(self, strength: Tensor) -> Tensor:
        """The map for one strength, ``[features, d_model]``."""
        return self.directions @ (self.moments / (self.values + strength)[:, None])


def residual_prior(subset: Subset) -> Tensor:
    """Scaled identity from each residual input to the target, ``[features, d_model]``; zero for other inputs."""
    # Every block adds to the residual stream, so the output of an early block is still part of it. The scales come
    # from least squares on standardised columns: otherwise the few very large columns would decide alone.
    d_model, residual_columns = subset.train.targets.shape[1], subset.features.residual_columns
    if not residual_columns:
        return torch.zeros(subset.train.inputs.shape[1], d_model, dtype=torch.float64)
    streams = len(residual_columns)
    squares, products = torch.zeros(streams, streams, d_model).double(), torch.zeros(streams, d_model).double()
    sums = torch.zeros(2, d_model, dtype=torch.float64)
    for inputs, targets in subset.train.chunks():
        y = targets.double() / subset.scale
        parts = torch.stack([inputs[:, part].double() for part in residual_columns])  # [streams, n, d_model]
        squares += torch.einsum("snd,tnd->std", parts, parts)
        products += torch.einsum("snd,nd->sd", parts, y)
        sums += torch.stack([y.sum(0), y.square().sum(0)])
    return _scaled_identities(subset, squares, products, sums)


def _scaled_identities(subset: Subset, squares: Tensor, products: Tensor, sums: Tensor) -> Tensor:
    """The prior map, by products of streams with streams and with targets, and sums of targets and of their squares.

    Args:
        subset: whose residual inputs are the streams.
        squares: ``[streams, streams, d_model]``.
        products: ``[streams, d_model]``.
        sums: ``[2, d_model]``.

    Returns:
        ``[features, d_model]``.
    """
    (size, features), d_model = subset.train.inputs.shape, sums.shape[1]
    weight = torch.zeros(features, d_model, dtype=torch.float64)
    variance = (sums[1] - sums[0].square() / size) / max(1, size - 1)
    precision = 1 / variance.clamp(min=1e-24)  # [d_model]
    gains = np.linalg.lstsq((squares @ precision).numpy(), (products @ precision).numpy(), rcond=MIN_EIGENVALUE)[0]
    for part, gain in zip(subset.features.residual_columns, gains, strict=True):
        weight[part] = gain * torch.eye(d_model, dtype=torch.float64)
    return weight


@functools.lru_cache(maxsize=8)
def ridge_spectrum(subset: Subset, device: torch.device = CPU) -> tuple[Tensor, Spectrum]:
    """The prior map, and the spectrum of the regression of what it leaves on the inputs.

    Solved in the smaller space: of features by their Gram matrix, or of concepts in the dual form (Saunders, Gammerman
    and Vovk, 1998, "Ridge regression learning algorithm in dual variables").

    Returns:
        The prior ``[features, d_model]`` and the spectrum, in float64 on the CPU.
    """
    if _is_dual(subset.train.inputs.shape):
        prior = residual_prior(subset)
        x, y = (part[:].to(device).double() for part in (subset.train.inputs, subset.train.targets))
        values, vectors = _eigenpairs(x @ x.mT)
        directions = x.mT @ (vectors / values.sqrt())
        moments = values.sqrt()[:, None] * (vectors.mT @ (y / subset.scale - x @ prior.to(device)))
    else:
        gram, products, sums = _second_moments(subset, device)
        parts = subset.features.residual_columns
        squares = [torch.stack([gram[one, other].diagonal() for other in parts]) for one in parts]
        across = [products[part].diagonal() for part in parts]
        prior = torch.zeros_like(products).cpu()
        if parts:
            prior = _scaled_identities(subset, torch.stack(squares).cpu(), torch.stack(across).cpu(), sums.cpu())
        values, directions = _eigenpairs(gram)
        moments = directions.mT @ (products - gram @ prior.to(device))
    return prior, Spectrum(values.cpu(), directions.cpu(), moments.cpu())


def _second_moments(subset: Subset, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``X^T X``, ``X^T Y`` and the sums ``[2, d_model]`` of ``Y`` and of its squares, for inputs X and targets Y."""
    # Products of a chunk are in float32 where concepts outnumber features by far, as the Gram matrix is then far from
    # singular for every strength; their sums are in float64.
    features, d_model = subset.train.inputs.shape[1], subset.train.targets.shape[1]
    shapes = (features, features), (features, d_model), (2, d_model)
    gram, products, sums = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
    dtype = torch.float32 if len(subset.train.inputs) >= WELL_POSED * features else torch.float64
    for inputs, targets in subset.train.chunks():
        x, y = inputs.to(device, dtype), targets.to(device).double() / subset.scale
        for start in range(0, features, GRAM_BLOCK):
            gram[start : start + GRAM_BLOCK, start:] += x[:, start : start + GRAM_BLOCK].mT @ x[:, start:]
        products += x.mT @ y.to(dtype)
        sums += torch.stack([y.sum(0), y.square().sum(0)])
    return gram.triu() + gram.triu(1).mT, products, sums


def ridge_flops(concepts: int, features: int, d_model: int, held_out: int) -> float:
    """Floating-point operations of `fit_ridge`, in float64; two in float32 count as one."""
    solved, share = min(concepts, features), 1.0
    if not _is_dual((concepts, features)):
        share = (1 + GRAM_BLOCK / features) / 2 if features > GRAM_BLOCK else 1.0  # the Gram matrix is symmetric
    reading = 2.0 * concepts * features * (share * solved + d_model) / (2 if concepts >= WELL_POSED * features else 1)
    solving = EIGEN_FLOPS * solved**3 + 4.0 * features * solved * d_model
    return reading + solving + 2.0 * held_out * solved * (features + len(STRENGTHS) * d_model)


def kernel_flops(concepts: int, features: int, d_model: int, held_out: int) -> float:
    """Floating-point operations of `fit_kernel`, in float64."""
    landmarks = min(concepts, LANDMARKS)
    near = (concepts + landmarks + held_out) * landmarks * (2.0 * features + EXP_FLOPS)
    solved = 4.0 * concepts * landmarks**2 + 2 * EIGEN_FLOPS * landmarks**3 + 4.0 * landmarks**3
    products = 2.0 * landmarks * d_model * (concepts + landmarks + held_out * len(KERNEL_STRENGTHS))
    return len(KERNEL_WIDTHS) * (near + solved + products)


def _is_dual(shape: tuple[int, int]) -> bool:
    """Whether the space of concepts is the smaller one, for ``[concepts, features]``."""
    return shape[0] <= shape[1]


def _eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[k]`` of a Gram matrix that are not zero, and their eigenvectors ``[n, k]``."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > MIN_EIGENVALUE * values[-1]
    return values[kept], vectors[:, kept]


@functools.lru_cache(maxsize=64)
def fit_ridge(subset: Subset, device: torch.device = CPU) -> Fit:
    """Ridge regression, shrunk towards `residual_prior`, for every strength; the best on validation, in float64."""
    prior, spectrum = ridge_spectrum(subset, device)
    mean_eigenvalue = spectrum.values.sum() / min(subset.train.inputs.shape)
    strengths = torch.from_numpy(STRENGTHS) * mean_eigenvalue
    held = subset.val.inputs.double()
    best, score = _best_strength(spectrum, strengths, held @ spectrum.directions, held @ prior, subset)
    weight = prior + spectrum.weight(best)
    return Fit({"weight": weight.float()}, float(best), score)


def _best_strength(
    spectrum: Spectrum, strengths: Tensor, projected: Tensor, passed: Tensor, subset: Subset
) -> tuple[Tensor, float]:
    """The best strength and its validation cosine, by held-out inputs ``[val, k]`` and the prior's predictions."""
    truth = subset.val.targets.double()
    scores = torch.stack([
        cosines(passed + (projected / (spectrum.values + strength)) @ spectrum.moments, truth).mean()
        for strength in strengths
    ])  # fmt: skip
    best = int(scores.argmax())
    return strengths[best], float(scores[best])


def apply_linear(parameters: dict[str, Tensor], inputs: Tensor, _masks: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    return torch.bmm(inputs, parameters["weight"])


def gaussian(inputs: Tensor, support: Tensor, width: Tensor) -> Tensor:
    """``exp(-width * squared distance)``, ``[S, B, features]`` and ``[S, N, features]`` to ``[S, B, N]``."""
    return torch.exp(-width * torch.cdist(inputs, support).square())


def fit_kernel(subset: Subset, device: torch.device = CPU) -> Fit:
    """Kernel ridge regression on top of `residual_prior`, for every width and strength; the best on validation.

    The kernel is centred at the first `LANDMARKS` training concepts: exact where these are all, else by the Nystroem
    method (Williams and Seeger, 2001), which fits all concepts with functions centred there.

    Returns:
        The fit, with what is centred there as `support`.
    """
    prior = residual_prior(subset).to(device)
    support = subset.train.inputs[:LANDMARKS].to(device).double()  # [landmarks, features]
    held = subset.val.inputs.to(device).double()
    passed = held @ prior  # [val, d_model]
    spread = _mean_squared_distance(subset)
    found = Fit({}, 0.0, -2.0)
    for width in KERNEL_WIDTHS:
        scaled = torch.tensor(width / spread, dtype=torch.float64, device=device).reshape(1, 1, 1)
        values, vectors = _eigenpairs(gaussian(support[None], support[None], scaled)[0])
        basis = vectors / values.sqrt()  # [landmarks, k]: products of features are the kernel
        gram = torch.zeros(len(values), len(values), dtype=torch.float64, device=device)
        products = torch.zeros(len(values), prior.shape[1], dtype=torch.float64, device=device)
        for inputs, targets in subset.train.chunks():
            x = inputs.to(device).double()
            features = gaussian(x[None], support[None], scaled)[0] @ basis  # [n, k]
            gram.addmm_(features.mT, features)
            products.addmm_(features.mT, targets.to(device).double() / subset.scale - x @ prior)
        values, directions = _eigenpairs(gram)
        spectrum = Spectrum(values.cpu(), (basis @ directions).cpu(), (directions.mT @ products).cpu())
        across = (gaussian(held[None], support[None], scaled)[0] @ basis @ directions).cpu()  # [val, k]
        # The kernel's mean eigenvalue is that of its diagonal, 1.
        strength, score = _best_strength(spectrum, torch.from_numpy(KERNEL_STRENGTHS), across, passed.cpu(), subset)
        if score > found.val_cosine:
            maps = {"weight": spectrum.weight(strength), "skip.weight": prior, "support": support, "width": scaled[0]}
            found = Fit({name: value.float().cpu() for name, value in maps.items()}, float(strength), score)
    return found


def _mean_squared_distance(subset: Subset) -> float:
    """The mean squared distance of two training concepts' inputs."""
    size, columns = subset.train.inputs.shape
    total, squares = torch.zeros(columns, dtype=torch.float64), 0.0
    for inputs, _ in subset.train.chunks():
        total += inputs.double().sum(0)
        squares += float(inputs.double().square().sum())
    return 2 * (squares - float(total.square().sum()) / size) / (size - 1)


def apply_kernel(parameters: dict[str, Tensor], inputs: Tensor, _masks: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    near = gaussian(inputs, parameters["support"], parameters["width"])
    return torch.bmm(near, parameters["weight"]) + torch.bmm(inputs, parameters["skip.weight"])


RIDGE = ClosedForm(fit_ridge, ridge_flops)
KERNEL = ClosedForm(fit_kernel, kernel_flops)
