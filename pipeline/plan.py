"""What is asked of an extraction, how it is cut into parts, and how the parts become a vectors file.

A request is known by a hash of all that decides its vectors. Its rows are cut into parts; every worker (process or
machine) reads its own parts and writes each as it is finished, into a folder beside the output that is named by the
hash. So memory does not grow with the number of concepts, and a run that was killed goes on with the parts that are
missing. Whoever finds all parts there merges them. What is in a part depends on the request and on the folder's plan
only, so the file is the same to the last byte, however often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pipeline.concepts import Catalogue, split
from pipeline.errors import InputError, WorkError, choices
from pipeline.processes import Worker
from pipeline.storage import Output, beginning, create, get, names_below, put, remove, write_atomically
from pipeline.teachers import Source, parse_layers
from pipeline.vectors import (
    FORMAT,
    TENSORS,
    Streamed,
    in_memory,
    parse_header,
    read_header,
    read_unverified_header,
    read_vectors,
    stored_dtype,
    write_streamed,
    write_vectors,
)

POOLS = ("last", "mean")
PLAN = "plan.json"
MOST_HEADER_BYTES = 1 << 30
PART_ROWS = 4096  # concepts of a part: what an interruption can cost
PART_BYTES = 1 << 26  # and what a worker holds of its vectors at once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be extracted, with all that decides the vectors."""

    concepts: tuple[str, ...]
    categories: tuple[str, ...]
    splits: tuple[str, ...]
    layers: tuple[int, ...]
    templates: tuple[str, ...]
    teacher: str
    revision: str
    pool: str
    dtype: str
    depth: int
    token_block: int | None = None

    @cached_property
    def key(self) -> str:
        """Hash of the request; the teacher counts by its weights and not by its name."""
        content = {name: value for name, value in asdict(self).items() if name != "teacher"} | {"format": FORMAT}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def header(self) -> dict[str, str]:
        """The header of its vectors file, without checksums."""
        values = {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in asdict(self).items()
        }
        return values | {"format": FORMAT, "extraction_key": self.key}


def make_request(
    source: Source,
    catalogue: Catalogue,
    *,
    layers: str,
    templates: Sequence[str],
    pool: str = "last",
    count: int | None = None,
    token_block: int | None = None,
) -> Request:
    """Check what the user asks for, before anything slow begins.

    Args:
        source: the teacher.
        catalogue: the concepts; the split is that of the whole catalogue, whatever ``count`` is.
        layers: "mid", "all", or block numbers such as "8,15"; 0 is the embedding output.
        templates: prompts, each with ``{concept}`` exactly once.
        pool: "last" reads the last token of the prompt, "mean" averages over the concept's tokens (in float32).
        count: extract only the first so many concepts, spread over the categories; all by default.
        token_block: an early block at which to read each of the concepts' tokens by itself as well.

    Raises:
        InputError: a template without ``{concept}``, an unknown pool or layer, or too few concepts.
    """
    check_prompts(templates, pool)
    if token_block is not None and token_block > source.depth:
        raise InputError(f"--token-block {token_block}: the teacher has {source.depth} blocks")
    rows = catalogue.first(count) if count is not None else range(len(catalogue))
    sides = split(catalogue)
    return Request(
        concepts=tuple(catalogue.concepts[row] for row in rows),
        categories=tuple(catalogue.categories[row] for row in rows),
        splits=tuple(sides[row] for row in rows),
        layers=parse_layers(layers, source.depth),
        templates=tuple(templates),
        teacher=source.name,
        revision=source.revision,
        pool=pool,
        dtype=source.dtype,
        depth=source.depth,
        token_block=token_block,
    )


def check_prompts(templates: Sequence[str], pool: str) -> None:
    """Check how concepts are to be put to the teacher.

    Raises:
        InputError: a template without ``{concept}``, one given twice, or an unknown pool.
    """
    for template in templates:
        if template.count("{concept}") != 1:
            raise InputError(f"--template {template!r}: expected {{concept}} exactly once")
    if len(set(templates)) < len(templates):
        raise InputError("--template: the same template twice")
    if pool not in POOLS:
        raise choices("pool", pool, POOLS)


def header_of(output: Output) -> dict[str, str] | None:
    """What stands at an output says of itself; nothing if it is no vectors file, None if nothing stands there.

    Raises:
        InputError, WorkError: the store does not let us look.
    """
    if output.url is None:
        return read_unverified_header(output.path) if output.path.is_file() else None
    head = beginning(output.url, 8)
    if head is None:
        return None
    length = 8 + int.from_bytes(head, "little")
    if length > MOST_HEADER_BYTES:
        return {}
    return parse_header(beginning(output.url, length) or b"")


def is_extracted(output: Output, request: Request) -> bool:
    """Whether the output holds the answer to this very request already, whole (S3 shows nothing that is not)."""
    if output.path.suffix == ".pt" or (header_of(output) or {}).get("extraction_key") != request.key:
        return False
    try:
        return output.url is not None or bool(read_header(output.path))
    except InputError:
        return False


def check_output(output: Output, request: Request, concepts: str) -> None:
    """Refuse to write over a file that is not a vectors file; say so where other vectors will be replaced.

    Raises:
        InputError: something else stands there.
    """
    header = header_of(output)
    if header is None:
        return
    if output.url is None and Path(concepts).exists() and output.path.samefile(concepts):
        raise InputError(f"--output {output}: that is the file of the concepts")
    if output.path.suffix == ".pt":
        return
    if not header.get("format", "").startswith(FORMAT.rstrip("0123456789")):  # those of older versions too
        raise InputError(f"--output {output}: exists, and is no vectors file; remove it or name another")
    if header.get("extraction_key") != request.key:
        log.warning("%s: replaces other vectors (extraction key %s)", output, header.get("extraction_key", "?")[:12])


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a request, and the file that will hold them."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """How a request is cut into parts; the first worker writes it down and all others keep to it."""

    output: Output
    folder: Path
    url: str | None
    rows: int
    part_rows: int
    batch_tokens: int

    @classmethod
    def open(cls, output: Output, request: Request, d_model: int, workers: int, batch_tokens: int) -> Plan:
        """Take up the plan that is there, or make one.

        Args:
            output: the vectors file to be.
            request: what is asked for.
            d_model: width of the teacher's residual stream.
            workers: how many there are; each should find work.
            batch_tokens: tokens of a batch.
        """
        row_bytes = 4 * len(request.templates) * len(request.layers) * d_model
        rows = min(PART_ROWS, PART_BYTES // row_bytes, math.ceil(len(request.concepts) / workers))
        content = json.dumps({"part_rows": max(1, rows), "batch_tokens": batch_tokens})
        parts = f".parts-{request.key[:12]}"
        folder = output.path.with_name(output.path.name + parts)
        url = None if output.url is None else output.url + parts
        stands = create(f"{url or folder}/{PLAN}", content)
        return cls(output, folder, url, len(request.concepts), **json.loads(stands))

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

    def clear(self) -> None:
        """Remove the parts."""
        if self.url is not None:
            remove(self.url)
        shutil.rmtree(self.folder, ignore_errors=True)


def merge(request: Request, plan: Plan) -> list[str]:
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
            Streamed("token_ids", np.dtype(np.int64), (int(offsets[-1]),), lambda: each("token_ids")),
            in_memory("token_offsets", offsets),
            in_memory("token_vocab", vocab),
            in_memory("token_embeddings", table("token_embeddings", vocab, peaks[0])),
            in_memory("token_activations", table("token_activations", alone, peaks[2])),
            Streamed("vectors", stored_dtype(peaks[1]), shape, lambda: each("vectors")),
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
