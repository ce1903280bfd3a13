"""The processes of a command: one, or as many as ``accelerate launch`` starts."""

from __future__ import annotations

import os
import re
import resource
import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from pipeline.errors import InputError


@dataclass(frozen=True)
class Worker:
    """One of ``count`` workers that share a job; the first has index 0."""

    index: int = 0
    count: int = 1


def parse_shard(text: str) -> Worker:
    """Worker i of n, from ``i/n``."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard {text}: expected i/n with i from 0 to n - 1, such as 0/4")
    return Worker(int(match[1]), int(match[2]))


def worker_of(shard: Worker, accelerator: Accelerator) -> Worker:
    """This process among the processes of all shards, which have the same number each."""
    size = accelerator.num_processes
    return Worker(shard.index * size + accelerator.process_index, shard.count * size)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB: GPU memory on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start() -> Accelerator:
    """Join the other processes and share the cores of this machine; ``accelerate`` would give each one thread."""
    accelerator = Accelerator()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    torch.set_num_threads(max(1, cores() // processes))
    return accelerator
