"""Grids span the cells that they say, and mistakes are pointed at."""

import pytest

from pipeline.errors import InputError
from pipeline.sweep.cells import prepare
from pipeline.sweep.grid import read_grid


def test_the_scaling_grid_has_24_cells():
    grid = read_grid("scaling")
    cells = grid.cells
    assert grid.name == "scaling"
    assert len(set(cells)) == 24
    assert {cell.concepts for cell in cells} == {100, 200, 400, 700}
    assert {(cell.hidden_dim, cell.layers) for cell in cells} == {(h, l) for h in (128, 256, 512) for l in (2, 4)}  # noqa: E741
    assert {(cell.epochs, cell.seed, cell.objective) for cell in cells} == {(100, 0, "cosine")}
    assert cells[0].name == "c100-h128-l2-s0"


def test_epochs_and_seeds_of_the_command_line_win():
    cells = read_grid("scaling", epochs=7, seeds=3).cells
    assert len(set(cells)) == 72
    assert {cell.seed for cell in cells} == {0, 1, 2}
    assert {cell.epochs for cell in cells} == {7}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "expected the keys"),
        ("axis: {concepts: [1]}", "unknown key 'axis'; did you mean 'axes'"),
        ("axes:\n  hiden_dim: [8]", "line 2: unknown key 'hiden_dim'; did you mean 'hidden_dim'"),
        ("\n\nfixed: {epoch: 3}", "line 3: unknown key 'epoch'; did you mean 'epochs'"),
        ("axes: {concepts: []}", "line 1: axis concepts: expected a list of at least one value"),
        ("axes: {concepts: 100}", "line 1: axis concepts: expected a list of at least one value"),
        ("axes: {concepts: [100, 100]}", "a value stands twice"),
        ("axes: {concepts: [100, many]}", "concepts 'many': expected a whole number"),
        ("axes: {seed: [1]}\nfixed: {seed: 1}", "both fixed and an axis"),
        ("fixed: {epochs: 0}", "epochs 0: expected at least 1"),
        ("axes:\n  seed: [1]\nfixed:\n  dropout: 1.0", "line 4: dropout 1.0: expected less than 1"),
        ("fixed:\n  seed: 1\n  seed: 2", "line 3: 'seed' stands already at line 2"),
        ("axes: {seed: [1]}\nexclude:\n  - seed: 2", "line 3: exclude: {'seed': 2} matches no cell"),
        ("axes: {seed: [1]}\nexclude:\n  - seed: 1", "no cells are left"),
        ("axes: {seed: [1]}\ninclude:\n  - seed: 2\n  - epochs: 0", "line 4: epochs 0: expected at least 1"),
        ("axes: {seed: [1]}\ninclude: 7", "line 2: include: expected a list of settings"),
        ("axes: {seed: [1]}\nseeds: 0", "line 2: seeds: expected a whole number of at least 1"),
        ("axes: {concepts: [1", "while parsing"),
        ("axes:\n  concepts:\n    - 100\n    - many", "line 4: concepts 'many': expected a whole number"),
        ("axes: {seed: [1]}\nfixed:\n  patience: never", "line 3: patience 'never': expected a whole number"),
        ("axes:\n  layer: [15, middle]", "line 2: layer 'middle': expected a whole number"),
        ("fixed:\n  skip: perhaps", "line 2: skip 'perhaps': expected true or false"),
    ],
)
def test_a_mistake_is_named_with_the_file(tmp_path, content, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"mine\.yaml") as caught:
        read_grid(str(path))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("axes:\n  student:\n    - mlp\n    - cnn", "line 4: unknown student 'cnn'; available: kernel, mlp"),
        ("fixed:\n  epochs: 3\n  objective: l1", "line 3: unknown objective 'l1'; available: cosine"),
        ("fixed:\n  objective: 0*mse", "line 2: objective 0*mse: expected positive weights"),
        ("axes:\n  concepts: [100]\ninclude:\n  - seed: 1\n  - concepts: 99999", "line 5: concepts 99999: the vec"),
        ("axes:\n  concepts:\n    - 100\n    - 99999", "line 4: concepts 99999: the vectors file has"),
        ("axes:\n  layer: [15]\ninclude:\n  - seed: 1\n    layer: 3", "line 5: layer 3: not in the vectors file"),
        ("fixed:\n  hidden_dim: 40\n  student: transformer", "line 2: hidden_dim 40: a transformer's is a mult"),
        ("axes:\n  student: [ridge]\n  inputs: [embeddings, pictures]", "line 3: unknown inputs 'pictures'"),
        ("fixed:\n  student: truncated\n  blocks: 5", "line 3: blocks 5: the vectors file has of the early blocks 1"),
        ("fixed:\n  inputs: block5+embeddings", "line 2: inputs block5+embeddings: the vectors file has of the early"),
        ("fixed:\n  targets: all", "line 2: targets all: the vectors file has one template"),
        ("fixed:\n  precision: half", "line 2: unknown precision 'half'; available: auto"),
    ],
)
def test_what_only_the_vectors_can_tell_is_named_with_the_line_too(tmp_path, data, content, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    grid = read_grid(str(path), epochs=5, seeds=2)
    with pytest.raises(InputError) as caught:
        prepare(grid.cells, data, grid.file)
    assert f"grid {path}, {complaint}" in str(caught.value)


def test_a_number_may_be_written_as_people_do(tmp_path):
    cells = span(tmp_path, "axes: {learning_rate: [1e-3, 2.0e-3, 1E-2]}\nfixed: {weight_decay: 0}")
    assert [cell.learning_rate for cell in cells] == [1e-3, 2e-3, 1e-2]


def test_an_unknown_grid_lists_those_that_exist():
    with pytest.raises(InputError, match=r"unknown grid 'scalling'; available: .*scaling"):
        read_grid("scalling")


def span(tmp_path, content, **options):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    return read_grid(str(path), **options).cells


def test_cells_can_be_left_out_and_added(tmp_path):
    cells = span(
        tmp_path,
        """
        fixed: {epochs: 5}
        axes: {concepts: [100, 200], layers: [1, 2]}
        exclude: [{concepts: 200, layers: 2}]
        include: [{concepts: 50, hidden_dim: 64}]
        """,
    )
    assert [(cell.concepts, cell.layers, cell.hidden_dim, cell.epochs) for cell in cells] == [
        (100, 1, 256, 5), (100, 2, 256, 5), (200, 1, 256, 5), (50, 2, 64, 5),
    ]  # fmt: skip


def test_all_concepts_are_those_that_the_vectors_have_for_training(tmp_path, data):
    content = """
        axes: {concepts: [100, 1838, all], student: [mlp, ridge], split: [concepts, categories]}
        exclude: [{concepts: all, split: categories, student: ridge}, {concepts: 1838, split: categories}]
        """
    cells = prepare(span(tmp_path, content), data)
    assert len(data.rows("train")) == 1838
    apart = len(data.rows("train", "categories"))
    expected = [(n, split, kind) for n, split in ((100, "concepts"), (100, "categories"), (1838, "concepts"))
                for kind in ("mlp", "ridge")] + [(apart, "categories", "mlp")]  # fmt: skip
    assert sorted((cell.concepts, cell.split, cell.student) for cell in cells) == sorted(expected)
    with pytest.raises(InputError, match=r"exclude: \{'concepts': 'all'\} matches no cell"):
        span(tmp_path, "axes: {concepts: [100]}\nexclude: [{concepts: all}]")
    with pytest.raises(InputError, match="hidden_dim 'all': expected a whole number"):
        span(tmp_path, "fixed: {hidden_dim: all}")


def test_the_growth_grid_goes_to_all_concepts_of_any_file(data):
    cells = [cell for cell in read_grid("growth").cells if cell.concepts <= 1838 or cell.concepts > 10**6]
    assert {cell.concepts for cell in prepare(cells, data)} == {100, 250, 700, 1838}
    assert {(cell.student, cell.hidden_dim, cell.layers) for cell in cells} == {("mlp", 512, 2), ("ridge", 256, 2)}


def test_an_axis_that_ridge_does_not_read_does_not_multiply_it(tmp_path):
    content = "axes: {student: [mlp, ridge], concepts: [50, 60], hidden_dim: [8, 16], layers: [1, 2]}\nseeds: 3"
    cells = span(tmp_path, content)
    assert sum(cell.student == "ridge" for cell in cells) == 2
    assert sum(cell.student == "mlp" for cell in cells) == 2 * 2 * 2 * 3
    assert len(span(tmp_path, content, seeds=1)) == 2 + 8
