"""Which precision is fast here."""

from __future__ import annotations

import functools
import time

import torch

CLEARLY = 4.0  # so many times as long


@functools.cache
def multiplies_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in a short type take well under the time that float32 takes here, measured.

    On one thread: where other programs are at work, several would wait for each other, and say little of the products.
    """
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()

    kinds = (torch.float32, dtype)
    pairs = [(torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)) for kind in kinds]
    times: list[list[float]] = [[], []]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(9):  # by turns, so that what else runs here slows both
        for (a, b), own in zip(pairs, times, strict=True):
            begin = time.perf_counter()
            a @ b
            own.append(time.perf_counter() - begin)
        long, short = (min(own) for own in times)
        if turn >= 2 and short > CLEARLY * long:  # no support at all: each product takes long
            break
    torch.set_num_threads(threads)
    return short < 0.8 * long
