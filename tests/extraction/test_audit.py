"""The audit finds what was put into the vectors."""

import numpy as np
import pytest

from pipeline.data.vectors import Vectors, write_vectors
from pipeline.extraction import audit_plots
from pipeline.extraction.audit import audit
from pipeline.extraction.request import Request

ROWS, LAYERS, WIDTH = 200, (4, 7), 64


@pytest.fixture
def written(tmp_path):
    random = np.random.default_rng(0)
    meaning = random.normal(size=(ROWS, 1, len(LAYERS), WIDTH))  # what the templates agree on
    category = random.normal(size=(2, 1, len(LAYERS), WIDTH))
    kinds = np.arange(ROWS) % 2
    vectors = meaning + category[kinds] + random.normal(size=(ROWS, 3, len(LAYERS), WIDTH)) * np.sqrt(2)
    vectors[17, 1, 0] *= 40
    request = Request(
        concepts=tuple(f"concept {row}" for row in range(ROWS)),
        categories=tuple("ab"[kind] for kind in kinds),
        splits=("train",) * ROWS,
        layers=LAYERS,
        templates=("x {concept}", "y {concept}", "z {concept}"),
        teacher="tiny", revision="0", pool="last", dtype="float32", depth=4,
    )  # fmt: skip
    named = {name: getattr(request, name) for name in Request.__dataclass_fields__ if name != "reader"}
    path = tmp_path / "vectors.safetensors"
    tokens = {"token_ids": np.zeros(ROWS, np.int64), "token_offsets": np.arange(ROWS + 1)}
    table = {"token_vocab": np.zeros(1, np.int64), "token_embeddings": np.zeros((1, WIDTH), np.float32)}
    table["token_activations"] = np.zeros((0, WIDTH), np.float32)
    write_vectors(
        Vectors(vectors=vectors.astype(np.float32), **tokens, **table, **named, extraction_key=request.key), path
    )
    return path, request, vectors


def test_norms_outliers_agreement_and_structure(written):
    path, request, vectors = written
    found = audit(path, request, ["concept 3"])
    np.testing.assert_allclose(found.norms, np.linalg.norm(vectors, axis=-1), rtol=1e-4)
    assert [(concept, template, layer) for concept, template, layer, _ in found.outliers] == [("concept 17", 1, 4)]
    # Between two templates: variance of meaning and category over that and the noise, (1 + 1/4...) by construction.
    centred = vectors[:, :, 1] - vectors[:, :, 1].mean(0)
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    expected = np.mean([(unit[:, a] * unit[:, b]).sum(-1).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    assert found.agreement[1] == pytest.approx(expected, abs=1e-5)
    assert found.categories == ["a", "b"]
    cosines = unit[:, 0] @ unit[:, 0].T
    same, other = cosines[0::2, 0::2], cosines[0::2, 1::2]
    assert found.structure[1, 0, 0] == pytest.approx((same.sum() - len(same)) / (same.size - len(same)), abs=1e-5)
    assert found.structure[1, 0, 1] == pytest.approx(other.mean(), abs=1e-5)


def test_what_may_spoil_training_is_said_with_names(written):
    path, request, _ = written
    found = audit(path, request, ["concept 3"])
    sink, outlier = found.warnings()
    assert "1 concepts are read at position 0" in sink
    assert "concept 3" in sink
    assert "concept 17" in outlier
    assert found.manifest()["norm_outliers"][0]["concept"] == "concept 17"
    assert found.metrics()["read_at_position_0"] == 1


def test_the_pictures_show_every_block_and_category(written):
    path, request, _ = written
    found = audit(path, request, [])
    norms = audit_plots.norms(found.norms, found.layers)
    assert [label.get_text() for label in norms.axes[0].get_xticklabels()] == ["4", "7"]
    structure = audit_plots.structure(found.structure, found.layers, found.categories)
    assert {axes.get_title() for axes in structure.axes} >= {"block 4", "block 7"}
