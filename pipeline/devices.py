"""The precision of matrix products where none is asked for: fixed rules, so that no clock decides a number.

They depend on the weights and on the kind of device alone, so the same command gives the same numbers and the same keys
on every machine of a kind. What its first worker took is recorded with an extraction and with a sweep, and the workers
that come later keep to it, whatever they run on.
"""

from __future__ import annotations

import torch


def teacher_precision(stored: object, device: torch.device) -> str:
    """The precision of a teacher: bfloat16 on CUDA for weights of 16 bits or fewer, else float32.

    Such weights lose nothing in bfloat16 arithmetic but the rounding of activations; others lose more.

    Args:
        stored: the type that the weights are stored in, as far as it is known.
        device: where the teacher computes.
    """
    is_short = isinstance(stored, torch.dtype) and stored.itemsize <= 2
    return "bfloat16" if is_short and device.type == "cuda" else "float32"


def training_precision(device: torch.device) -> str:
    """The precision of training: bfloat16 on CUDA, float32 elsewhere."""
    return "bfloat16" if device.type == "cuda" else "float32"


def bfloat16_hint(option: str, taken: str, device: torch.device) -> str | None:
    """Advice for processors that have instructions for bfloat16 where float32 was taken; None for others.

    Args:
        option: how bfloat16 is asked for.
        taken: the precision in use.
        device: where it is used.
    """
    if device.type != "cpu" or taken != "float32":
        return None
    known = torch.cpu.get_capabilities()
    if not (known.get("amx_bf16") or known.get("avx512_bf16")):
        return None
    return f"hint: this processor has instructions for bfloat16; {option} may be faster, with slightly other numbers"
