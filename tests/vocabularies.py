"""The vocabulary of a vectors file, as tests ask for it."""

from contextlib import nullcontext

import torch

from pipeline.devices import TeacherAccess
from pipeline.extraction.vocabulary import find


def silent(_total):
    """A bar that shows nothing."""
    return nullcontext(lambda done: None)


def find_vocabulary(vectors, place):
    """Beside the vectors file, or read from its teacher."""
    return find(vectors, str(place), TeacherAccess(torch.device("cpu")), silent)
