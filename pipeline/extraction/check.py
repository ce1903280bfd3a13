"""A few prompts through the untouched model, before a long extraction: are its vectors ours?

The untouched model runs one prompt at a time, without a token tree and with all its arithmetic as the library has it.
In float32 our vectors must equal its own. In a short type both are compared with the model in float32 arithmetic, of
which one module at a time is made; ours may not be much farther from that than the untouched model is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import WorkError
from pipeline.extraction.reader import TOLERANCE, Reader, plain_vectors
from pipeline.extraction.request import Request
from pipeline.teachers.find import Teacher, TeacherSource
from pipeline.teachers.load import apply_precision, has_plain_weights, load_untouched
from pipeline.teachers.prompts import Prompt, tokenize

ENDS = 2  # concepts from each end of the lengths
MIDDLE = 4
BATCH_TOKENS = 1024
MIN_ALLOWED = 0.005  # of a vector's norm, in a short type
FACTOR = 2.0  # times the untouched model's own error in a short type

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Vectors of the untouched model, ``[prompts, layers, d_model]`` in float32."""

    prompts: Sequence[Sequence[Prompt]]  # of each template
    plain: Tensor  # in the precision asked for
    exact: Tensor | None  # in float32 arithmetic; None where the precision is float32, or the weights are packed


@dataclass(frozen=True)
class Comparison:
    """Distances from the untouched model's vectors, relative to their norm, for each block."""

    layers: Sequence[int]
    prompts: int  # the number compared
    errors: Sequence[float]  # the largest over prompts in float32, the median in a short type
    allowed: Sequence[float]  # the largest that are accepted

    def manifest(self) -> dict[str, Any]:
        """The comparison for an extraction's manifest."""
        return {
            "prompts": self.prompts,
            "error_by_block": dict(zip(map(str, self.layers), self.errors, strict=True)),
            "allowed_by_block": dict(zip(map(str, self.layers), self.allowed, strict=True)),
        }

    def metrics(self) -> dict[str, float]:
        """The comparison as MLflow metrics: of the worst block."""
        return {"check_error": max(self.errors), "check_prompts": self.prompts}


def load_checked(
    source: TeacherSource, request: Request, device: torch.device, device_map: str | None
) -> tuple[Teacher, Comparison]:
    """Load a teacher and compare its vectors with those of the untouched model; arguments as of `load_teacher`."""
    untouched = load_untouched(source, device, device_map)
    log.info("checking a few prompts against the model's own pass")
    expected = reference_vectors(untouched, request)
    teacher = apply_precision(untouched)
    return teacher, compare(teacher, request, expected)


def reference_vectors(teacher: Teacher, request: Request) -> Reference:
    """Run a few of a request's concepts, the shortest and longest among them, through an untouched teacher."""
    by_length = sorted(request.concepts, key=len)
    middle = by_length[ENDS : len(by_length) - ENDS]
    chosen = dict.fromkeys([*by_length[:ENDS], *middle[:: max(1, len(middle) // MIDDLE)][:MIDDLE], *by_length[-ENDS:]])
    prompts = [tokenize(teacher, list(chosen), template) for template in request.templates]

    def vectors() -> Tensor:
        return torch.stack([plain_vectors(teacher, prompt, request.layers, request.pool) for prompt in chain(*prompts)])

    plain = vectors()
    if teacher.dtype == "float32" or not has_plain_weights(teacher.model):
        return Reference(prompts, plain, None)
    with in_float32(teacher.model):
        return Reference(prompts, plain, vectors())


def compare(teacher: Teacher, request: Request, expected: Reference) -> Comparison:
    """Compare vectors of an extraction with `reference_vectors`; a WorkError where a block's are too far apart."""
    values, _ = Reader(teacher, request, BATCH_TOKENS, lambda prompts: None).read(expected.prompts)
    ours = values.transpose(0, 1).flatten(0, 1).to(expected.plain)  # [prompts, layers, d_model]
    exact = expected.plain if expected.exact is None else expected.exact

    def errors_of(vectors: Tensor) -> Tensor:  # [layers]
        errors: Tensor = (vectors - exact).norm(dim=-1) / exact.norm(dim=-1)
        # In float32 every prompt counts; rounding in a short type may send a token to another expert now and then.
        return errors.amax(0) if teacher.dtype == "float32" else errors.median(0).values

    errors = errors_of(ours)
    if expected.exact is None:
        allowed = torch.full_like(errors, TOLERANCE[teacher.dtype])
    else:
        allowed = (FACTOR * errors_of(expected.plain)).clamp_min(MIN_ALLOWED)
    found = Comparison(request.layers, len(ours), errors.tolist(), allowed.tolist())
    for layer, error, most in zip(request.layers, found.errors, found.allowed, strict=True):
        if not error <= most:
            raise WorkError(
                f"--teacher {teacher.name}: after block {layer} vectors are {error:.2g} of their norm from the model's "
                f"own pass, and {most:.2g} is allowed; nothing was extracted (--dtype float32 may do, or --check off)"
            )
    return found


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Run a model of short floating-point weights in float32 arithmetic, one module at a time in float32."""
    short: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by module: its tensors and their data

    def lengthen(module: nn.Module, args: Any, kwargs: Any) -> Any:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        short[id(module)] = [(tensor, tensor.data) for tensor in own if _is_short(tensor)]
        for tensor, data in short[id(module)]:
            tensor.data = data.float()
        return _lengthened(args), {name: _lengthened(value) for name, value in kwargs.items()}

    def restore(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        for tensor, data in short.pop(id(module), []):
            tensor.data = data
        return _lengthened(output)

    with ExitStack() as hooks:
        for module in model.modules():
            if not isinstance(module, nn.Embedding):  # a table has no arithmetic
                hooks.enter_context(module.register_forward_pre_hook(lengthen, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(restore, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for tensor, data in chain(*short.values()):
                tensor.data = data


def _is_short(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.itemsize == 2


def _lengthened(value: Any) -> Any:
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(_lengthened, value))
    return value.float() if _is_short(value) else value
