"""The processes of a command: one, or as many as ``accelerate launch`` starts."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator


def start() -> Accelerator:
    """Join the other processes, and share the cores of this machine with them.

    ``accelerate launch`` gives a process one thread on a CPU, whatever the machine has; a process that is alone
    should use it all.
    """
    accelerator = Accelerator()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    return accelerator
