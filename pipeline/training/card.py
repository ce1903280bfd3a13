"""Cards (README files) of shared students and vectors files, in the format of the Hugging Face hub.

`huggingface_hub.ModelCard` would need the same templates and takes over a second to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.settings import SIZED

TAGS = ["activation-distillation", "interpretability", "activation-vectors"]
METRICS = {
    "cosine, not centred": "test_cosine_raw",
    "R2": "test_r2",
    "retrieval@1": "test_retrieval_at_1",
    "retrieval@5": "test_retrieval_at_5",
}


def student_card(config: Mapping[str, Any], training_concepts: int) -> str:
    """The README of a student folder, from its configuration and the number of its training concepts."""
    metrics, cell, licence = config["metrics"], config["cell"], config["teacher_licence"]
    header = {"library_name": "activation-distillation", "license": licence, "tags": TAGS}
    rows = [
        ("test cosine, centred", f"{metrics['test_cosine']:.3f} (95 %: {metrics['test_cosine_low']:.3f} to "
         f"{metrics['test_cosine_high']:.3f}, over concepts)"),
        ("of that lost to 8 bits and low rank", f"{metrics['test_cosine_lost_to_size']:.4f}"),
        *((f"test {title}", f"{metrics[name]:.3f}") for title, name in METRICS.items() if name in metrics),
    ]  # fmt: skip
    has_size = config["student"] in SIZED
    return _card("student_card.md", header | {"pipeline_tag": "feature-extraction"}).format(
        config=config,
        cell=cell,
        licence=licence,
        training_concepts=training_concepts,
        shape=f", {cell['hidden_dim']} wide, {cell['layers']} deep" if has_size else "",
        method=f"objective {cell['objective']}, seed {cell['seed']}" if has_size else "in closed form",
        table="".join(f"| {name} | {value} |\n" for name, value in rows),
    )


def vectors_card(header: Mapping[str, str], licence: str, concepts: int) -> str:
    """The README of a shared vectors file, from its header, the teacher's licence and the number of concepts."""
    card = _card("vectors_card.md", {"license": licence, "tags": TAGS})
    return card.format(header=header, licence=licence, concepts=concepts)


def _card(template: str, header: Mapping[str, Any]) -> str:
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return f"---\n{yaml.safe_dump(dict(header), sort_keys=False)}---\n\n{text}"
