"""Grids span the cells that they say, and mistakes are pointed at."""

import pytest

from pipeline.errors import InputError
from pipeline.grid import read_grid


def test_the_scaling_grid_has_24_cells():
    name, cells = read_grid("scaling")
    assert name == "scaling"
    assert len(set(cells)) == 24
    assert {cell.concepts for cell in cells} == {100, 200, 400, 700}
    assert {(cell.hidden_dim, cell.layers) for cell in cells} == {(h, l) for h in (128, 256, 512) for l in (2, 4)}  # noqa: E741
    assert {(cell.epochs, cell.seed, cell.objective) for cell in cells} == {(100, 0, "cosine")}
    assert cells[0].name == "c100-h128-l2-s0"


def test_epochs_and_seeds_of_the_command_line_win():
    _, cells = read_grid("scaling", epochs=7, seeds=3)
    assert len(set(cells)) == 72
    assert {cell.seed for cell in cells} == {0, 1, 2}
    assert {cell.epochs for cell in cells} == {7}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "expected the keys"),
        ("axis: {concepts: [1]}", "unknown key 'axis'; did you mean 'axes'"),
        ("axes: {hiden_dim: [8]}", "axes: unknown key 'hiden_dim'; did you mean 'hidden_dim'"),
        ("fixed: {epoch: 3}", "fixed: unknown key 'epoch'; did you mean 'epochs'"),
        ("axes: {concepts: []}", "axes, concepts: expected a list of at least one value"),
        ("axes: {concepts: 100}", "axes, concepts: expected a list of at least one value"),
        ("axes: {concepts: [100, 100]}", "a value stands twice"),
        ("axes: {concepts: [100, many]}", "concepts 'many': expected a whole number"),
        ("axes: {seed: [1]}\nfixed: {seed: 1}", "both fixed and an axis"),
        ("fixed: {epochs: 0}", "epochs 0: expected at least 1"),
        ("fixed: {dropout: 1.0}", "dropout 1.0: expected less than 1"),
        ("axes: {concepts: [1", "while parsing"),
    ],
)
def test_a_mistake_is_named_with_the_file(tmp_path, content, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"mine\.yaml") as caught:
        read_grid(str(path))
    assert complaint in str(caught.value)


def test_an_unknown_grid_lists_those_that_exist():
    with pytest.raises(InputError, match="unknown grid 'scalling'; available: scaling"):
        read_grid("scalling")
