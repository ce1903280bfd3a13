"""Python without the calls that only Linux has: ``PYTHONPATH=tests/elsewhere pytest -n0 tests/test_sweep.py``."""

import os

del os.fork, os.sched_getaffinity
