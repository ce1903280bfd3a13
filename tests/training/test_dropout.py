"""Dropout equals a mask of the hidden units in each block, drawn once per step and seed."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.settings import Cell
from pipeline.training import mlp, transformer
from pipeline.training.regularisation import Dropout, DropoutMasks

MEMBERS, BATCH, FEATURES, OUTPUTS, HIDDEN, LAYERS = 3, 5, 80, 6, 32, 2
CPU = torch.device("cpu")


def masked_mlp(parameters, inputs, mask, masks):
    """With a mask of the hidden units in each block, as nn.Dropout applies it."""
    hidden = (inputs * mask) @ parameters["in.weight"] + parameters["in.bias"]
    for block in range(LAYERS):
        change = F.gelu(hidden @ parameters[f"block{block}.weight"] + parameters[f"block{block}.bias"])
        hidden = hidden + change * masks[:, block, None]
    return hidden @ parameters["out.weight"] + parameters["out.bias"]


def masked_transformer(parameters, inputs, mask, masks):
    """The change at each site is linear in its weights, so that the mask may be applied to these."""
    masked = dict(parameters)
    names = [f"block{block}.{way}.weight" for block in range(LAYERS) for way in ("merge", "down")]
    for site, name in enumerate(names):
        masked[name] = parameters[name] * masks[:, site, None]
    return transformer.apply(masked, inputs * mask)


@pytest.mark.parametrize("shared", [True, False], ids=["one seed", "a seed each"])
@pytest.mark.parametrize(
    ("student", "masked", "start"),
    [
        (mlp, masked_mlp, lambda source: mlp.init(FEATURES, OUTPUTS, HIDDEN, LAYERS, source)),
        (
            transformer,
            masked_transformer,
            lambda source: transformer.init(4, FEATURES // 4, OUTPUTS, HIDDEN, LAYERS, source),
        ),
    ],
    ids=["mlp", "transformer"],
)
def test_answers_and_gradients_are_those_of_masks(student, masked, start, shared):
    source = torch.Generator().manual_seed(0)
    shapes = start(source)
    parameters = {
        name: torch.randn(MEMBERS, *value.shape, generator=source, dtype=torch.float64).mul(0.3).requires_grad_()
        for name, value in shapes.items()
    }
    inputs = torch.randn(MEMBERS, BATCH, FEATURES, generator=source, dtype=torch.float64)
    sites, seeds, kept = student.DROPOUT_SITES * LAYERS, 1 if shared else MEMBERS, 20
    mask = (torch.rand(seeds, BATCH, FEATURES, generator=source) < 0.6).double() / 0.6
    drawn = torch.rand(seeds, sites, HIDDEN, generator=source).topk(kept).indices
    masks = torch.zeros(seeds, sites, HIDDEN, dtype=torch.float64).scatter_(-1, drawn, HIDDEN / kept)

    expected = masked(parameters, inputs, mask, masks)
    answer = student.apply(parameters, inputs, DropoutMasks(mask, masks[:, :, None].unbind(1)))
    torch.testing.assert_close(answer, expected)
    gradients = [torch.autograd.grad(one.pow(3).sum(), list(parameters.values())) for one in (answer, expected)]
    for name, own, other in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(own, other, msg=name)


def test_every_unit_is_kept_as_often_and_members_of_one_seed_share_the_draw():
    cells = [Cell(hidden_dim=40, layers=2, dropout=0.4, batch_size=8, seed=seed) for seed in (0, 0, 1)]
    dropout = Dropout(cells, 10, 2, torch.float32, CPU)
    counts, share = torch.zeros(3, 2, 40), torch.zeros(())
    for _ in range(400):
        drawn = dropout.draw(8)
        kept = torch.cat(drawn.units, 1) * 24 / 40
        torch.testing.assert_close(kept, kept.round())
        assert torch.equal(kept[0], kept[1])
        counts += kept.round()
        share += (drawn.inputs > 0).float().mean() / 400
    assert counts.sum(-1).unique().tolist() == [400 * 24]  # no unit twice
    assert 0.48 < counts.min() / 400 < counts.max() / 400 < 0.72
    assert not torch.equal(counts[0], counts[2])
    assert share == pytest.approx(0.6, abs=0.01)


def test_without_dropout_nothing_is_drawn():
    assert Dropout([Cell(dropout=0.0)], 10, 2, torch.float32, CPU).draw(8) is None
