"""Cards are read by the Hugging Face hub, and state what is known of a student and of a vectors file."""

from dataclasses import asdict

from huggingface_hub import DatasetCard, ModelCard

from pipeline.settings import Cell
from pipeline.training.card import TAGS, student_card, vectors_card

METRICS = {"test_cosine": 0.81, "test_cosine_low": 0.8, "test_cosine_high": 0.82, "test_cosine_lost_to_size": 0.0001}
CONFIG = {"teacher": "owner/model", "revision": "abc", "layer": 15, "template": "Tell me about {concept}",
          "pool": "last", "vectors_sha256": "ff", "teacher_licence": "apache-2.0", "student": "mlp",
          "cell": asdict(Cell()), "metrics": METRICS | {"test_r2": 0.5}}  # fmt: skip


def test_the_card_of_a_student():
    card = ModelCard(student_card(CONFIG, 12345), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "library_name": "activation-distillation", "license": "apache-2.0", "tags": TAGS,
        "pipeline_tag": "feature-extraction",
    }  # fmt: skip
    for line in (
        "| block and template | 15, `Tell me about {concept}` |",
        "| student | mlp, 256 wide, 2 deep, reads activations |",
        "| trained on | 12,345 concepts, objective cosine, seed 0 |",
        "| test cosine, centred | 0.810 (95 %: 0.800 to 0.820, over concepts) |",
        "| test R2 | 0.500 |",
    ):
        assert f"\n{line}\n" in card.text
    assert "retrieval" not in card.text  # was not measured
    assert "12,345 concepts, in closed form |" in student_card(CONFIG | {"student": "ridge"}, 12345)


def test_the_card_of_a_vectors_file():
    header = {"teacher": "owner/model", "revision": "abc", "pool": "last", "layers": "[15]", "dtype": "float32",
              "templates": '["Tell me about {concept}"]', "extraction_key": "key"}  # fmt: skip
    card = DatasetCard(vectors_card(header, "mit", 2000), ignore_metadata_errors=False)
    assert card.data.to_dict() == {"license": "mit", "tags": TAGS}
    assert card.text.startswith("\n# Activation vectors of owner/model\n")
    assert "for 2,000 concepts, read at\n`last` after blocks [15]" in card.text
