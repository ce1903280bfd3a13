"""Baselines: the nearest training concept is that of the whole matrix of cosines, which is never made."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.analysis.baselines import nearest
from pipeline.data.examples import MAX_CHUNK, Examples, LazyExamples, LazyMatrix
from pipeline.settings import Cell


def test_the_nearest_of_very_many_training_concepts_is_that_of_the_whole_matrix(data):
    generator = torch.Generator().manual_seed(0)
    number, held = 2 * MAX_CHUNK + 100, MAX_CHUNK + 50

    def drawn(count):
        return Examples(list(range(count)), torch.randn(count, 12, generator=generator), torch.randn(count, 3))

    train, side = drawn(number), drawn(held)
    train.inputs[MAX_CHUNK : 2 * MAX_CHUNK] = train.inputs[:MAX_CHUNK].clone()  # each cosine twice; the first counts
    lazy = [LazyMatrix.of(np.arange(number), values.numpy().__getitem__) for values in (train.inputs, train.targets)]
    subset = replace(data.subset(Cell(concepts=20, layer=15)), train=LazyExamples(train.rows, *lazy))
    expected = (F.normalize(side.inputs.double()) @ F.normalize(train.inputs.double()).T).argmax(1)
    found = nearest(subset, side)
    assert (found == train.targets[expected]).all(1).float().mean() > 0.999
