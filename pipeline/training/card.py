"""Cards: what a shared student or vectors file says of itself, for people and for the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.settings import SIZED

TAGS = ("activation-distillation", "interpretability", "activation-vectors")


def _front_matter(values: Mapping[str, Any]) -> str:
    lines = ["---"]
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            lines += [f"{name}:", *(f"- {entry}" for entry in value)]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join([*lines, "---", ""])


def student_card(config: Mapping[str, Any], training_concepts: int) -> str:
    """The README of a student folder.

    Args:
        config: the student's.
        training_concepts: how many concepts it was trained on.
    """
    metrics, cell = config["metrics"], config["cell"]
    head = {
        "library_name": "activation-distillation",
        "license": config["teacher_licence"],
        "tags": TAGS,
        "pipeline_tag": "feature-extraction",
    }
    rows = [
        ("test cosine, centred", f"{metrics['test_cosine']:.3f} (95 %: {metrics['test_cosine_low']:.3f} to "
         f"{metrics['test_cosine_high']:.3f}, over concepts)"),
        ("of that lost to 8 bits and low rank", f"{metrics['test_cosine_lost_to_size']:.4f}"),
        *((f"test {title}", f"{metrics[name]:.3f}") for title, name in METRICS.items() if name in metrics),
    ]  # fmt: skip
    descends = config["student"] in SIZED
    shape = f", {cell['hidden_dim']} wide, {cell['layers']} deep" if descends else ""
    way = f"objective {cell['objective']}, seed {cell['seed']}" if descends else "in closed form"
    return (
        _front_matter(head)
        + f"""
# A student of {config["teacher"]}, block {config["layer"]}

From text to the vector that **{config["teacher"]}** holds for it, without running that model: the residual stream after
block {config["layer"]}, pooled by `{config["pool"]}`, of the prompt `{config["template"]}`.

```python
from pipeline import Student

student = Student.load("this-folder")
vectors = student.encode(["volcano", "slow cooking"])  # [2, d_model], not centred
```

| | |
| --- | --- |
| teacher | {config["teacher"]}, weights `{config["revision"]}` |
| block and template | {config["layer"]}, `{config["template"]}` |
| student | {config["student"]}{shape}, reads {cell["inputs"]} |
| trained on | {training_concepts:,} concepts, {way} |
| vectors | sha256 `{config["vectors_sha256"]}` |

## How faithful it is

Held-out concepts share no word with training, but for words that very many concepts share.
Cosines are centred: a constant answer scores 0.

| metric | value |
| --- | --- |
"""
        + "".join(f"| {name} | {value} |\n" for name, value in rows)
        + f"""
## Limits

- It knows short concepts in the language of its training concepts. For sentences, other languages and code its vectors
  were not measured.
- It answers for one template, one block and one pooling.
- What is wrong or unfair in the teacher's vectors is so in its own.

## Licence

The teacher's licence is `{config["teacher_licence"]}`; the tables of this student are made from its weights, so
its terms apply.
"""
    )


METRICS = {
    "cosine, not centred": "test_cosine_raw",
    "R2": "test_r2",
    "retrieval@1": "test_retrieval_at_1",
    "retrieval@5": "test_retrieval_at_5",
}


def vectors_card(header: Mapping[str, str], licence: str, concepts: int) -> str:
    """The README of a shared vectors file.

    Args:
        header: of the file.
        licence: of the teacher.
        concepts: how many there are.
    """
    head = {"license": licence, "tags": TAGS}
    return (
        _front_matter(head)
        + f"""
# Activation vectors of {header["teacher"]}

The residual stream of **{header["teacher"]}** (weights `{header["revision"]}`) for {concepts:,} concepts, read at
`{header["pool"]}` after blocks {header["layers"]} of the templates {header["templates"]}, in {header["dtype"]}.

The file is safetensors: `vectors` is `[concepts, templates, layers, d_model]`; the header lists concepts, categories
and the split into training, validation and test. Extraction key `{header["extraction_key"]}`.

## Licence

The teacher's licence is `{licence}`; the vectors are made with its weights, so its terms apply.
"""
    )
