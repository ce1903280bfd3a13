"""Small students that reproduce a language model's activation vectors from a concept's text."""

__version__ = "0.1.0"

import os
from typing import Any

# Huge pages for torch's large CPU tensors, read by it when it is loaded: fewer page faults, 3 to 6 % of an extraction.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """``from pipeline import Student``, loaded when asked for."""
    if name == "Student":
        from pipeline.student.student import Student

        return Student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
