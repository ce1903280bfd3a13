"""A trained student as a thing of its own: a folder with `config.json` and `model.safetensors`, nothing else needed.

It answers for the concepts of the vectors file that it was trained with, whose tokens it carries.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.errors import InputError
from pipeline.features import Catalogued, Reading, Subset
from pipeline.options import Cell
from pipeline.storage import fetch, write_atomically
from pipeline.students.kinds import KINDS

FORMAT = "student-3"


@dataclass(frozen=True)
class Student:
    """A student with all that turns a concept's text into a vector.

    Attributes:
        config: what it is and where it comes from (plain JSON values).
        parameters: its weights, each with a leading member axis of 1.
        mean: mu of its training vectors, ``[d_model]``, which is added to its answer.
        reading: how it reads.
        token_rows: rows of the reading's token tables of each known concept.
    """

    config: dict[str, Any]
    parameters: dict[str, Tensor]
    mean: Tensor
    reading: Reading
    token_rows: dict[str, Tensor]

    @classmethod
    def from_training(
        cls, cell: Cell, parameters: dict[str, Tensor], subset: Subset, data: Catalogued, metrics: dict[str, float]
    ) -> Student:
        """Join trained parameters (member axis 1, in units of the subset's scale) with what they were trained on."""
        vectors = data.vectors
        config = {
            "format": FORMAT,
            "student": cell.student,
            "cell": {name: getattr(cell, name) for name in Cell.__dataclass_fields__},
            "teacher": vectors.teacher,
            "revision": vectors.revision,
            "layer": cell.layer,
            "template": vectors.templates[0],
            "pool": vectors.pool,
            "extraction_key": vectors.extraction_key,
            "vectors_sha256": vectors.sha256,
            "metrics": metrics,
        }
        held = {name: value.detach().cpu().clone() for name, value in parameters.items()}
        return cls(config, held, subset.mean, subset.reading, dict(zip(vectors.concepts, data.types, strict=True)))

    @torch.inference_mode()
    def encode(self, concepts: Sequence[str]) -> NDArray[np.float32]:
        """The predicted activation vectors, not centred, ``[n, d_model]``.

        Raises:
            InputError: a concept that the student has no tokens for.
        """
        places = {concept: row for row, concept in enumerate(self.token_rows)}
        for concept in concepts:
            if concept not in places:
                raise InputError(f"concept {concept!r}: not in the vectors file that the student was trained with")
        types, rows = [self.token_rows[concept] for concept in concepts], [places[concept] for concept in concepts]
        inputs = self.reading(concepts, types, rows)
        answer: Tensor = KINDS[self.config["student"]].apply(self.parameters, inputs[None])[0]
        return (answer + self.mean).numpy()

    def save(self, folder: Path) -> None:
        """Write the folder's files, each whole or not at all."""
        names = list(self.token_rows)
        lengths = torch.tensor([0, *(len(self.token_rows[name]) for name in names)])
        tensors = {f"parameters.{name}": value.contiguous() for name, value in self.parameters.items()}
        tensors |= {f"tables.{name}": value.contiguous() for name, value in self.reading.tables.items()}
        tensors |= {
            "mean": self.mean,
            "feature_offset": self.reading.offset,
            "feature_scale": self.reading.scale,
            "token_rows": torch.cat([self.token_rows[name] for name in names]),
            "token_offsets": lengths.cumsum(0),
        }
        config = self.config | {"inputs": self.reading.inputs, "concepts": names}
        text = json.dumps(config, indent=1, ensure_ascii=False)
        write_atomically(folder / "model.safetensors", lambda part: part.write_bytes(save(tensors)))
        write_atomically(folder / "config.json", lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | Path) -> Student:
        """Read a student folder.

        Raises:
            InputError: not a student folder, or a damaged one.
        """
        folder = fetch(str(folder))
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config.get("format") != FORMAT or config.get("student") not in KINDS:
                raise InputError(f"student {folder}: format {config.get('format')!r}, expected {FORMAT!r}")
            tensors = load((folder / "model.safetensors").read_bytes())
            names, offsets = config.pop("concepts"), tensors["token_offsets"]
            rows = [tensors["token_rows"][a:b] for a, b in itertools.pairwise(offsets)]

            def group(prefix: str) -> dict[str, Tensor]:
                return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

            reading = Reading(
                config.pop("inputs"), group("tables."), tensors["feature_offset"], tensors["feature_scale"]
            )
            return cls(config, group("parameters."), tensors["mean"], reading, dict(zip(names, rows, strict=True)))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"student {folder}: not a student folder, or damaged ({error})") from error
