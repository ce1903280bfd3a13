"""Small students that reproduce a language model's activation vectors from a concept's text."""

__version__ = "0.1.0"

import os

# Huge pages for torch's large CPU tensors, read by it when it is loaded: fewer page faults, 3 to 6 % of an extraction.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
