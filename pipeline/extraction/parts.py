"""How a request is cut into parts, and how the parts become a vectors file.

A part is some of the request's rows. Every worker (process or machine) reads its own parts and writes each as it is
finished, into a folder beside the output that is named by a hash of what was asked for. So memory does not grow with
the number of concepts, and a run that was killed goes on with the parts that are missing. The worker that finds all
parts merges them. What is in a part depends on the request and on the folder's plan only, so the file is the same to
the last byte, however often the work was interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pipeline.data.vectors import (
    TENSORS,
    StreamedTensor,
    read_vectors,
    stored_dtype,
    stream_array,
    write_streamed,
    write_vectors,
)
from pipeline.errors import InputError, WorkError
from pipeline.extraction.request import Request, is_extracted
from pipeline.processes import Worker
from pipeline.storage import Output, create, get, names_below, put, remove, write_atomically

PLAN = "plan.json"
PART_ROWS = 4096  # concepts of a part: what an interruption can cost
PART_BYTES = 1 << 26  # and what a worker holds of its vectors at once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a request, and the file that will hold them."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class PartPlan:
    """How a request is cut into parts, and its precision; the first worker writes it down and all others keep to it."""

    output: Output
    folder: Path
    url: str | None
    rows: int
    part_rows: int
    batch_tokens: int
    dtype: str

    @classmethod
    def open(
        cls,
        output: Output,
        request: Request,
        d_model: int,
        workers: int,
        batch_tokens: int,
        dtype_is_open: bool = False,
    ) -> PartPlan:
        """Take up the plan that is there, or make one.

        Args:
            output: the vectors file to be.
            request: what is asked for.
            d_model: width of the teacher's residual stream.
            workers: how many there are; each should find work.
            batch_tokens: tokens of a batch.
            dtype_is_open: whether the user left the precision open; then the request's is only the first worker's to
                decide, and the plan's ``dtype`` holds for all.
        """
        row_bytes = 4 * len(request.templates) * len(request.layers) * d_model
        rows = min(PART_ROWS, PART_BYTES // row_bytes, math.ceil(len(request.concepts) / workers))
        content = json.dumps({"part_rows": max(1, rows), "batch_tokens": batch_tokens, "dtype": request.dtype})
        asked = replace(request, dtype="auto") if dtype_is_open else request
        parts = f".parts-{asked.key[:12]}"
        folder = output.path.with_name(output.path.name + parts)
        url = None if output.url is None else output.url + parts
        stands = create(f"{url or folder}/{PLAN}", content)
        return cls(output, folder, url, len(request.concepts), **{"dtype": request.dtype} | json.loads(stands))

    @cached_property
    def parts(self) -> list[Part]:
        """All parts, in the order of their rows."""
        starts = range(0, self.rows, self.part_rows)
        return [
            Part(self.folder / f"part-{number:06}.safetensors", start, min(start + self.part_rows, self.rows))
            for number, start in enumerate(starts)
        ]

    def _names(self) -> set[str]:
        """What of the plan and its parts is there."""
        if self.url is not None:
            return names_below(self.url)
        return {path.name for path in self.folder.glob("*")}

    @property
    def is_merged(self) -> bool:
        """Whether another worker has merged the parts and removed them."""
        return PLAN not in self._names()

    def missing(self, worker: Worker | None = None) -> list[Part]:
        """The parts that are still to be read, by this worker or by anybody."""
        own = self.parts if worker is None else self.parts[worker.index :: worker.count]
        there = self._names()
        return [part for part in own if part.path.name not in there]

    def publish(self, part: Part) -> None:
        """Show a part that was written to the workers on other machines."""
        if self.url is not None:
            put(part.path, f"{self.url}/{part.path.name}")

    def collect(self) -> None:
        """Bring the parts of other machines here."""
        for part in self.parts:
            if not part.path.is_file():
                get(f"{self.url}/{part.path.name}", part.path)

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove the plan again where the work fails before it has begun."""
        try:
            yield
        except (InputError, WorkError):
            self.clear()
            raise

    def clear(self) -> None:
        """Remove the parts."""
        if self.url is not None:
            remove(self.url)
        shutil.rmtree(self.folder, ignore_errors=True)


def merge(request: Request, plan: PartPlan) -> list[str]:
    """Join all parts to the vectors file, in memory that does not grow with them, and remove them.

    Several workers may do so at once: each writes the same bytes and puts them into place.

    Returns:
        The concepts whose vector was read at position 0.

    Raises:
        WorkError: parts are missing.
    """
    output = plan.output
    if missing := plan.missing():
        if is_extracted(output, request):  # another worker has merged
            return []
        raise WorkError(
            f"{output}: {len(missing)} of {len(plan.parts)} parts are not extracted yet; run the shards that are left"
        )

    def each(name: str) -> Iterator[NDArray[Any]]:
        for part in plan.parts:
            with safe_open(part.path, framework="np") as file:
                yield file.get_tensor(name)

    in_sink = np.zeros(plan.rows, bool)
    try:
        plan.collect()
        in_sink = np.concatenate(list(each("in_sink")))
        peaks = np.stack(list(each("peaks"))).max(0)
        offsets = np.cumsum([0, *np.concatenate(list(each("token_lengths")))], dtype=np.int64)
        vocab = np.unique(np.concatenate(list(each("token_vocab"))))
        d_model = next(each("vectors")).shape[-1]

        def table(name: str, types: NDArray[Any], peak: float) -> NDArray[Any]:
            pairs = zip(each("token_vocab"), each(name), strict=True)
            return _token_table(types, pairs, np.empty((len(types), d_model), stored_dtype(peak)))

        alone = vocab if request.token_block is not None else vocab[:0]
        shape = (plan.rows, len(request.templates), len(request.layers), d_model)
        tensors = [
            StreamedTensor("token_ids", np.dtype(np.int64), (int(offsets[-1]),), lambda: each("token_ids")),
            stream_array("token_offsets", offsets),
            stream_array("token_vocab", vocab),
            stream_array("token_embeddings", table("token_embeddings", vocab, peaks[0])),
            stream_array("token_activations", table("token_activations", alone, peaks[2])),
            StreamedTensor("vectors", stored_dtype(peaks[1]), shape, lambda: each("vectors")),
        ]
        assert tuple(tensor.name for tensor in tensors) == TENSORS
        if output.path.suffix == ".pt":
            whole = plan.folder / "whole.safetensors"
            write_atomically(whole, lambda path: write_streamed(path, request.header, tensors))
            write_vectors(read_vectors(whole), output.path)
        else:
            write_atomically(output.path, lambda path: write_streamed(path, request.header, tensors))
        output.publish()
    except (OSError, InputError):
        if not is_extracted(output, request):  # else another worker has merged and removed the parts meanwhile
            raise
    plan.clear()
    return [request.concepts[row] for row in np.flatnonzero(in_sink)]


def _token_table(
    vocab: NDArray[Any], parts: Iterable[tuple[NDArray[Any], NDArray[Any]]], values: NDArray[Any]
) -> NDArray[Any]:
    """Fill one table of all tokens, ``[types, d_model]``, from the parts' own."""
    for types, own in parts:
        if len(own):
            values[np.searchsorted(vocab, types)] = own
    return values
