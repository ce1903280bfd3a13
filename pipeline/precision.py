"""Which precision is fast here."""

from __future__ import annotations

import functools
import time

import torch


@functools.cache
def multiplies_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in a short type take well under the time that float32 takes here, measured."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()

    def seconds(kind: torch.dtype) -> float:
        a, b = torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(dtype) < 0.8 * seconds(torch.float32)
