"""A trained student as a thing of its own: a folder with `config.json` and `model.safetensors`, nothing else needed.

It answers for the concepts of the vectors file that it was trained with, whose tokens it carries.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
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
from pipeline.features import Subset, token_features
from pipeline.options import Cell
from pipeline.storage import write_atomically
from pipeline.students import mlp, ridge
from pipeline.vectors import Vectors

FORMAT = "student-1"
STUDENTS: dict[str, Callable[..., Tensor]] = {"mlp": mlp.apply, "ridge": ridge.apply}


@dataclass(frozen=True)
class Student:
    """A student with all that turns a concept's text into a vector.

    Attributes:
        config: what it is and where it comes from (plain JSON values).
        parameters: its weights, each with a leading member axis of 1.
        mean: mu of its training vectors, ``[d_model]``, which is added to its answer.
        feature_mean, feature_std: standardisation of its inputs, ``[features]``.
        token_embeddings: ``[types, d_model]``.
        token_rows: rows of ``token_embeddings`` of each known concept.
    """

    config: dict[str, Any]
    parameters: dict[str, Tensor]
    mean: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    token_embeddings: Tensor
    token_rows: dict[str, Tensor]

    @classmethod
    def from_training(
        cls, cell: Cell, parameters: dict[str, Tensor], subset: Subset, vectors: Vectors, metrics: dict[str, float]
    ) -> Student:
        """Join trained parameters (member axis 1, in units of the subset's scale) with what they were trained on."""
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
        return cls(
            config,
            {name: value.detach().cpu().clone() for name, value in parameters.items()},
            subset.mean,
            subset.feature_mean,
            subset.feature_std,
            torch.from_numpy(vectors.token_embeddings.copy()),
            {name: torch.from_numpy(rows) for name, rows in zip(vectors.concepts, vectors.token_rows, strict=True)},
        )

    @torch.inference_mode()
    def encode(self, concepts: Sequence[str]) -> NDArray[np.float32]:
        """The predicted activation vectors, not centred, ``[n, d_model]``.

        Raises:
            InputError: a concept that the student has no tokens for.
        """
        for concept in concepts:
            if concept not in self.token_rows:
                raise InputError(f"concept {concept!r}: not in the vectors file that the student was trained with")
        features = token_features(self.token_embeddings.float(), [self.token_rows[concept] for concept in concepts])
        inputs = (features - self.feature_mean) / self.feature_std
        answer: Tensor = STUDENTS[self.config["student"]](self.parameters, inputs[None])[0]
        return (answer + self.mean).numpy()

    def save(self, folder: Path) -> None:
        """Write the folder's files, each whole or not at all."""
        names = list(self.token_rows)
        lengths = torch.tensor([0, *(len(self.token_rows[name]) for name in names)])
        tensors = {f"parameters.{name}": value.contiguous() for name, value in self.parameters.items()}
        tensors |= {name: getattr(self, name) for name in ("mean", "feature_mean", "feature_std", "token_embeddings")}
        tensors |= {
            "token_rows": torch.cat([self.token_rows[name] for name in names]),
            "token_offsets": lengths.cumsum(0),
        }
        config = self.config | {"concepts": names}
        text = json.dumps(config, indent=1, ensure_ascii=False)
        write_atomically(folder / "model.safetensors", lambda part: part.write_bytes(save(tensors)))
        write_atomically(folder / "config.json", lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | Path) -> Student:
        """Read a student folder.

        Raises:
            InputError: not a student folder, or a damaged one.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config.get("format") != FORMAT or config.get("student") not in STUDENTS:
                raise InputError(f"student {folder}: format {config.get('format')!r}, expected {FORMAT!r}")
            tensors = load((folder / "model.safetensors").read_bytes())
            names, offsets = config.pop("concepts"), tensors["token_offsets"]
            rows = [tensors["token_rows"][a:b] for a, b in itertools.pairwise(offsets)]
            prefix = "parameters."
            return cls(
                config,
                {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
                tensors["mean"],
                tensors["feature_mean"],
                tensors["feature_std"],
                tensors["token_embeddings"],
                dict(zip(names, rows, strict=True)),
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"student {folder}: not a student folder, or damaged ({error})") from error
