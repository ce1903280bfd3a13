"""Shapes checked at run time in every test of this process: what extraction, data sets and students give out."""

import functools

import numpy as np
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor

from pipeline.data.dataset import Dataset
from pipeline.extraction import reader
from pipeline.student.student import Student


@jaxtyped(typechecker=beartype)
def vectors_of_texts(_vectors: Float[np.ndarray, "texts d_model"], _mean: Float[np.ndarray, " d_model"]):
    """Of several texts."""


@jaxtyped(typechecker=beartype)
def vector_of_a_text(_vector: Float[np.ndarray, " d_model"], _mean: Float[np.ndarray, " d_model"]):
    """Of one text."""


@jaxtyped(typechecker=beartype)
def training_subset(
    _train_inputs: Float[Tensor, "train features"],
    _train_targets: Float[Tensor, "train d_model"],
    _val_inputs: Float[Tensor, "val features"],
    _val_targets: Float[Tensor, "val d_model"],
    _test_inputs: Float[Tensor, "test features"],
    _test_targets: Float[Tensor, "test d_model"],
    _mean: Float[Tensor, " d_model"],
):
    """Of a data set."""


@jaxtyped(typechecker=beartype)
def activation_vectors(_values: Float[Tensor, "prompts templates layers d_model"]):
    """Of an extraction."""


def check_shapes():
    """Wrap what gives out arrays; a wrong shape or type raises where it arises."""
    encode, subset, read = Student.encode, Dataset.subset, reader.Reader.read

    @functools.wraps(encode)
    def checked_encode(self, sentences, *options, **named):
        vectors = encode(self, sentences, *options, **named)
        (vector_of_a_text if isinstance(sentences, str) else vectors_of_texts)(vectors, self.mean)
        return vectors

    @functools.wraps(subset)
    def checked_subset(self, cell):
        found = subset(self, cell)
        sides = [part[:2] for side in (found.train, found.val, found.test) for part in (side.inputs, side.targets)]
        training_subset(*sides, found.mean)
        return found

    @functools.wraps(read)
    def checked_read(self, prompts):
        values, tokens = read(self, prompts)
        activation_vectors(values)
        assert values.shape[1:3] == (len(prompts), len(self.request.layers))
        return values, tokens

    Student.encode, Dataset.subset, reader.Reader.read = checked_encode, checked_subset, checked_read
