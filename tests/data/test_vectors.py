"""The vectors file comes back as it was written, and nothing else is taken for it."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHIPPED
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.vectors import Vectors, read_header, read_vectors, write_vectors
from pipeline.errors import InputError

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


ONES, ZEROS = torch.ones(4), torch.zeros(4)


@pytest.mark.parametrize(
    "table",
    [
        {"ice": np.ones(4), "fire": np.zeros(4, np.float32)},
        {"ice": ONES.bfloat16(), "fire": ZEROS.double()},
        {"ice": ONES[None], "fire": ZEROS[None]},
        {"ice": [1.0] * 4, "fire": [0] * 4},
        {"ice": torch.nn.Parameter(ONES), "fire": ZEROS},
        {"concepts": ["ice", "fire"], "vectors": [ONES, ZEROS]},
        {"concepts": np.array(["ice", "fire"]), "vectors": np.stack([ONES, ZEROS]).astype(np.float16)},
        {"concepts": ("ice", "fire"), "vectors": torch.stack([ONES, ZEROS])[:, None], "layer": 8},
        {"vectors": ONES, "concepts": ZEROS},  # which are names of concepts too
        [("ice", ONES), ("fire", ZEROS)],
        (["ice", "fire"], [ONES, ZEROS]),
        [torch.stack([ONES, ZEROS]), ["ice", "fire"]],
    ],
)
def test_a_table_of_older_work_is_read_in_any_form_whose_meaning_is_clear(tmp_path, table):
    torch.save(table, tmp_path / "old.pt")
    back = read_vectors(tmp_path / "old.pt")
    assert back.concepts in (("ice", "fire"), ("vectors", "concepts"))
    assert back.vectors.dtype == np.float32
    np.testing.assert_array_equal(back.vectors, np.array([[1] * 4, [0] * 4])[:, None, None])


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ([ONES, ZEROS], "a list of 2 values without their concepts"),
        ([np.ones(4)], "a list of 1 values without their concepts"),
        (torch.ones(3, 4), "a tensor of float32 [3, 4] without concepts"),
        (np.ones((3, 4)), "a tensor of float64 [3, 4] without concepts"),
        ("a text", "a value of type str"),
        (None, "a value of type NoneType"),
        ([], "a list of 0 values"),
        ({}, "no concepts"),
        ({"ice": ONES, "fire": torch.ones(5)}, "'fire' has a vector of 5 numbers, and 'ice' one of 4"),
        ({"ice": torch.ones(2, 4)}, "'ice' has a tensor of float32 [2, 4]"),
        ({"ice": torch.tensor(1.0)}, "'ice' has a tensor of float32 []"),
        ({"ice": torch.ones(0)}, "'ice' has a tensor of float32 [0]"),
        ({"ice": "cold"}, "'ice' has a value of type str"),
        ({"ice": {"8": ONES}}, "'ice' has a value of type dict"),
        ({"ice": torch.ones(4, dtype=torch.complex64)}, "'ice' has a tensor of complex64 [4]"),
        ({"concepts": ["ice", "fire"], "vectors": torch.ones(3, 4)}, "2 concepts and 3 vectors"),
        ({"concepts": ["ice", "fire"], "vectors": torch.ones(2, 3, 4)}, "'ice' has a tensor of float32 [3, 4]"),
        ({"concepts": ["ice", "ice"], "vectors": torch.ones(2, 4)}, "the concept 'ice' twice"),
        ({"concepts": ["ice"], "vectors": torch.tensor(1.0)}, "a tensor of float32 [] for vectors"),
        ({"concepts": ["ice"]}, "a value of type NoneType for vectors"),
        ({"concepts": ["ice", None], "vectors": torch.ones(2, 4)}, "concepts that are not all texts"),
    ],
)
def test_a_table_whose_meaning_is_not_clear_is_refused_in_one_line_that_says_what_is_expected(tmp_path, table, found):
    torch.save(table, tmp_path / "old.pt")
    with pytest.raises(InputError) as refused:
        read_vectors(tmp_path / "old.pt")
    message = str(refused.value)
    assert found in message
    assert "expected {concept: vector}" in message
    assert "\n" not in message


def test_a_pt_file_that_is_damaged_is_refused_in_one_line(tmp_path):
    torch.save({"ice": ONES, "fire": ZEROS}, tmp_path / "whole.pt")
    content = tmp_path.joinpath("whole.pt").read_bytes()
    for share in range(0, len(content), 97):
        tmp_path.joinpath("cut.pt").write_bytes(content[:share])
        with pytest.raises(InputError):
            read_vectors(tmp_path / "cut.pt")
    for text in (b"", b"not at all", bytes(range(256)), b"\x80\x02}q\x00."):
        tmp_path.joinpath("other.pt").write_bytes(text)
        with pytest.raises(InputError):
            read_vectors(tmp_path / "other.pt")
