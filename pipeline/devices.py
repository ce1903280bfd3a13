"""Where a teacher runs, and the default precision of matrix products.

The rules of precision depend only on the weights and on the kind of device, so that the same command gives the same
numbers and keys on every machine of a kind. Extractions and sweeps record the precision of their first worker, and
later workers use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TeacherAccess:
    """Where the teacher of a vectors file runs, and where it is if its name in the file does not tell."""

    device: torch.device
    device_map: str | None = None  # how it is spread over devices
    trust_remote_code: bool = False  # whether it may run code that comes with its weights
    name: str | None = None


def teacher_precision(stored: object, device: torch.device) -> str:
    """The precision of a teacher whose weights are stored as ``stored``, if known."""
    # bfloat16 on CUDA for weights of 16 bits or fewer, else float32, as only long weights lose digits in bfloat16.
    is_short = isinstance(stored, torch.dtype) and stored.itemsize <= 2
    return "bfloat16" if is_short and device.type == "cuda" else "float32"


def training_precision(device: torch.device) -> str:
    """The precision of training: bfloat16 on CUDA, float32 elsewhere."""
    return "bfloat16" if device.type == "cuda" else "float32"


def bfloat16_hint(option: str, precision: str, device: torch.device) -> str | None:
    """One line that advises the option for bfloat16, if the processor has instructions for it but uses float32."""
    features = torch.cpu.get_capabilities() if device.type == "cpu" and precision == "float32" else {}
    if not (features.get("amx_bf16") or features.get("avx512_bf16")):
        return None
    return f"hint: this processor has instructions for bfloat16; {option} may be faster, with slightly other numbers"
