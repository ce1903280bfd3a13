"""The vectors file comes back as it was written, and nothing else is taken for it."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHIPPED
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.vectors import Vectors, read_header, read_vectors, write_vectors

SMALL = Vectors(
    vectors=np.arange(24, dtype=np.float32).reshape(3, 1, 2, 4),
    token_ids=np.array([7, 5, 7, 9]),
    token_offsets=np.array([0, 1, 3, 4]),
    token_vocab=np.array([5, 7, 9]),
    token_embeddings=np.ones((3, 4), np.float16),
    token_activations=np.ones((3, 4), np.float32),
    concepts=("ice", "ice cream", "voilà"),
    categories=("Nature", "Food", "Abstract"),
    splits=("train", "val", "test"),
    layers=(8, 15),
    templates=("Tell me about {concept}",),
    token_block=1,
    depth=30,
    teacher="tiny",
    revision="sha256:0",
    pool="last",
    dtype="float32",
    extraction_key="abc",
)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "made" / "small.safetensors"
    write_vectors(SMALL, path)
    back = read_vectors(path)
    assert back.header == SMALL.header
    assert back.token_rows[1].tolist() == [0, 1]
    np.testing.assert_array_equal(back.vectors, SMALL.vectors)
    assert read_header(path) == SMALL.header
    assert [file.name for file in path.parent.iterdir()] == ["small.safetensors"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "small.safetensors"
    write_vectors(SMALL, path)
    return path


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed(written, data):
    content = bytearray(written.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    damaged = written.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    try:
        back = read_vectors(damaged)
    except InputError:
        with pytest.raises(InputError):
            read_header(damaged)
        return
    # White space in the header's JSON is all that may change unnoticed: it changes nothing.
    assert back.header == SMALL.header
    assert bytes(content[place : place + 1]).isspace()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    content = SHIPPED.read_bytes()
    path = tmp_path / "short.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"short\.safetensors: damaged"):
        read_vectors(path)


def test_a_pickle_is_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    for name in ("bomb.safetensors", "bomb.pt"):
        tmp_path.joinpath(name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError, match="run code"):
            read_vectors(tmp_path / name)
    torch.save(Bomb(), tmp_path / "zipped.pt")
    with pytest.raises(InputError, match="run code"):
        read_vectors(tmp_path / "zipped.pt")
    assert not tmp_path.joinpath("exploded").exists()


def test_values_that_are_not_finite_are_named(tmp_path):
    values = SMALL.vectors.copy()
    values[1, 0, 1, 2] = np.nan
    path = tmp_path / "nan.safetensors"
    write_vectors(replace(SMALL, vectors=values), path)
    with pytest.raises(InputError, match="'ice cream'"):
        read_vectors(path)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match="make it with 'extract'"):
        read_vectors(tmp_path / "none.safetensors")


def test_tables_of_older_work_are_read_and_written(tmp_path):
    table = {"ice": torch.ones(4), "fire": torch.zeros(4)}
    torch.save(table, tmp_path / "dict.pt")
    torch.save({"concepts": list(table), "vectors": torch.stack(list(table.values()))}, tmp_path / "lists.pt")
    for name in ("dict.pt", "lists.pt"):
        back = read_vectors(tmp_path / name)
        assert back.concepts == ("ice", "fire")
        np.testing.assert_array_equal(back.vectors[:, 0, 0], [[1] * 4, [0] * 4])
    one_layer = replace(SMALL, vectors=SMALL.vectors[:, :, :1], layers=(8,))
    write_vectors(one_layer, tmp_path / "again.pt")
    np.testing.assert_array_equal(read_vectors(tmp_path / "again.pt").vectors, one_layer.vectors)
    with pytest.raises(InputError, match="one layer"):
        write_vectors(SMALL, tmp_path / "two.pt")
