"""A vector is that of the plain forward pass, whatever the batch and the padding."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES

from pipeline.concepts import Catalogue, split
from pipeline.errors import InputError
from pipeline.extraction import extract
from pipeline.teachers import load_teacher, parse_layers, residuals

CONCEPTS = ("ice", "volcano", "slow cooking", "a", "theory of general relativity", "wisdom", "down-to-earth")
FEW = Catalogue(CONCEPTS, ("any",) * len(CONCEPTS))
TEMPLATES = ("Tell me about {concept}", "{concept}", "The word {concept} means that")
LAYERS = (0, 2, 4)


def plain(teacher, text, positions):
    """The plain forward pass of one prompt: hidden states of all blocks, the last before the final norm."""
    ids = torch.tensor([teacher.tokenizer(text)["input_ids"]])
    last = {}
    hook = teacher.blocks[-1].register_forward_hook(
        lambda module, args, output: last.update(value=output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        states = list(teacher.model(ids, output_hidden_states=True).hidden_states)
    hook.remove()
    states[-1] = last["value"]
    return torch.stack([state[0, positions(ids.shape[1])].mean(0) for state in states]).numpy()  # [layers, d_model]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request, tiny_folder):
    return load_teacher(str(tiny_folder(request.param)))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [1, 16, 40, 4096])
def test_every_batch_and_padding_gives_the_vector_of_one_prompt_alone(tiny, padding_side, batch_tokens):
    found = extract(
        tiny, FEW, layers=LAYERS, templates=TEMPLATES, batch_tokens=batch_tokens, padding_side=padding_side
    ).vectors
    for row, concept in enumerate(CONCEPTS):
        for column, template in enumerate(TEMPLATES):
            alone = plain(tiny, template.replace("{concept}", concept), lambda length: [length - 1])[list(LAYERS)]
            error = np.linalg.norm(found[row, column] - alone, axis=-1) / np.linalg.norm(alone, axis=-1)
            assert error.max() < 1e-3, (concept, template)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_mean_pooling_averages_over_the_concepts_own_tokens(tiny, padding_side):
    found = extract(tiny, FEW, layers=(3,), templates=TEMPLATES[2:], pool="mean", padding_side=padding_side)
    for row, concept in enumerate(CONCEPTS):
        text = TEMPLATES[2].replace("{concept}", concept)
        spans = tiny.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        start = TEMPLATES[2].index("{")
        own = [place for place, (a, b) in enumerate(spans) if a < start + len(concept) and b > start]
        alone = plain(tiny, text, lambda length, own=own: own)[3]
        assert np.linalg.norm(found.vectors[row, 0, 0] - alone) < 1e-3 * np.linalg.norm(alone)


def test_the_concepts_tokens_and_their_embeddings_are_in_the_table(tiny):
    found = extract(tiny, FEW, layers=(1,), templates=TEMPLATES[:1])
    table = tiny.embedding_table.detach().numpy()
    for row, concept in enumerate(CONCEPTS):
        start, stop = found.token_offsets[row : row + 2]
        assert tiny.tokenizer.decode(found.token_ids[start:stop]).strip() == concept
        expected = table[found.token_ids[start:stop]]
        np.testing.assert_allclose(found.token_embeddings[found.types(row)], expected, atol=1e-3)


def test_nothing_past_the_deepest_block_is_run(tiny):
    ran = []
    hooked = [(len(block._forward_hooks), len(block._forward_pre_hooks)) for block in tiny.blocks]
    hooks = [
        block.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
        for number, block in enumerate(tiny.blocks, start=1)
    ]
    ids = torch.tensor([[5, 6, 7]])
    residuals(tiny, ids, torch.ones_like(ids), (0, 2))
    for hook in hooks:
        hook.remove()
    assert ran == [1, 2]
    assert [(len(block._forward_hooks), len(block._forward_pre_hooks)) for block in tiny.blocks] == hooked


def test_fewer_concepts_keep_their_split_and_their_vectors(tiny, catalogue):
    whole = dict(zip(catalogue.concepts, split(catalogue), strict=True))
    few = extract(tiny, catalogue, count=60, layers=(2,), templates=TEMPLATES[:1])
    fewer = extract(tiny, catalogue, count=30, layers=(2,), templates=TEMPLATES[:1])
    assert set(fewer.concepts) < set(few.concepts)
    assert len(set(fewer.categories)) == 19
    assert all(whole[concept] == side for concept, side in zip(few.concepts, few.splits, strict=True))
    for row, concept in enumerate(fewer.concepts):
        np.testing.assert_allclose(fewer.vectors[row], few.vectors[few.concepts.index(concept)], rtol=2e-3, atol=2e-3)


def test_the_shipped_vectors_are_those_of_the_embedded_teacher(smollm2, catalogue, vectors):
    again = extract(smollm2, catalogue, count=60, layers=(8, 15, 22), templates=TEMPLATES[:1])
    rows = [vectors.concepts.index(concept) for concept in again.concepts]
    mean = vectors.vectors.astype(np.float64).mean(0)
    a, b = again.vectors.astype(np.float64) - mean, vectors.vectors[rows].astype(np.float64) - mean
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.9999
    assert (again.teacher, again.revision) == (vectors.teacher, vectors.revision)


def test_the_embedded_teacher_agrees_with_its_plain_forward_pass(smollm2):
    found = extract(smollm2, FEW, layers=(0, 15, 30), templates=TEMPLATES[:1]).vectors
    for row, concept in enumerate(CONCEPTS):
        alone = plain(smollm2, f"Tell me about {concept}", lambda length: [length - 1])[[0, 15, 30]]
        error = np.linalg.norm(found[row, 0] - alone, axis=-1) / np.linalg.norm(alone, axis=-1)
        assert error.max() < 1e-3


@pytest.mark.parametrize(
    ("text", "expected"), [("mid", (15,)), ("8,15", (8, 15)), ("15,8,8", (8, 15)), ("0,30", (0, 30))]
)
def test_layers_are_read_from_text(text, expected):
    assert parse_layers(text, 30) == expected
    assert parse_layers("all", 2) == (0, 1, 2)


@pytest.mark.parametrize("text", ["31", "-1", "middle", "8,,15", ""])
def test_layers_that_do_not_exist_are_refused(text):
    with pytest.raises(InputError, match="--layers"):
        parse_layers(text, 30)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("qwen4", "available: .*qwen3-1.7b"),
        ("missing.gguf", "no such file"),
        ("owner/model", "cannot load"),
    ],
)
def test_a_teacher_that_does_not_exist_is_refused_with_advice(name, complaint):
    with pytest.raises(InputError, match=complaint):
        load_teacher(name)


def test_an_empty_folder_is_no_teacher(tmp_path):
    with pytest.raises(InputError, match="not a saved model"):
        load_teacher(str(tmp_path))
