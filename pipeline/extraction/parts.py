"""Parts of a request: how it is cut into them, how each is read and written, and how they become a vectors file.

A part is some of the request's rows. Every worker (process or machine) reads its own parts and writes each as it is
finished, into a folder beside the output that is named by the request's hash. So memory does not grow with the number
of concepts, and a run that was killed goes on with the missing parts. The worker that finds all parts merges them. A
part depends on the request and on the folder's plan only, so the file is the same to the last byte, however often the
work was interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

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
from pipeline.extraction.reader import Reader
from pipeline.extraction.request import Request, is_extracted, read_output_header
from pipeline.processes import Worker
from pipeline.s3 import object_names, remove_objects
from pipeline.storage import Output, download, upload, write_atomically, write_if_absent
from pipeline.student.tokenizer import RaggedArray
from pipeline.teachers.find import Teacher
from pipeline.teachers.prompts import Prompt, tokenize
from pipeline.teachers.residuals import flops_per_token

PLAN = "plan.json"
PART_ROWS = 4096  # concepts of a part: what an interruption can cost
PART_BYTES = 1 << 26  # of a part's vectors, which a worker holds at once
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a request, and the file that will hold them."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class PartPlan:
    """How a request is cut into parts, and its precision: written by the first worker, followed by all others."""

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
        workers: int,  # their number; each should find work
        batch_tokens: int,
        dtype_is_open: bool = False,  # the user left the precision open, and the first worker's holds for all
    ) -> PartPlan:
        """Read the plan, or write it where there is none; its ``dtype`` holds instead of the request's."""
        row_bytes = 4 * len(request.templates) * len(request.layers) * d_model
        rows = min(PART_ROWS, PART_BYTES // row_bytes, math.ceil(len(request.concepts) / workers))
        content = json.dumps({"part_rows": max(1, rows), "batch_tokens": batch_tokens, "dtype": request.dtype})
        asked = replace(request, dtype="auto") if dtype_is_open else request
        suffix = f".parts-{asked.key[:12]}"
        folder = output.path.with_name(output.path.name + suffix)
        url = None if output.url is None else output.url + suffix
        written = json.loads(write_if_absent(f"{url or folder}/{PLAN}", content))
        return cls(output, folder, url, len(request.concepts), **{"dtype": request.dtype} | written)

    @cached_property
    def parts(self) -> list[Part]:
        """All parts, in the order of their rows."""
        starts = range(0, self.rows, self.part_rows)
        return [
            Part(self.folder / f"part-{number:06}.safetensors", start, min(start + self.part_rows, self.rows))
            for number, start in enumerate(starts)
        ]

    def _names(self) -> set[str]:
        """Names of the plan and part files that exist."""
        return {path.name for path in self.folder.glob("*")} if self.url is None else object_names(self.url)

    @property
    def is_merged(self) -> bool:
        """Whether another worker has merged the parts and removed them."""
        return PLAN not in self._names()

    def missing(self, worker: Worker | None = None) -> list[Part]:
        """The parts that are still to be read, by one worker or by all."""
        own = self.parts if worker is None else self.parts[worker.index :: worker.count]
        names = self._names()
        return [part for part in own if part.path.name not in names]

    def wait_for(self, workers: Sequence[Worker]) -> None:
        """Wait until the parts of some workers are read."""
        while any(self.missing(worker) for worker in workers) and not self.is_merged:
            time.sleep(POLL_SECONDS)

    def publish(self, part: Part) -> None:
        """Make a written part visible to workers on other machines."""
        if self.url is not None:
            upload(part.path, f"{self.url}/{part.path.name}")

    def collect(self) -> None:
        """Copy the parts of other machines here."""
        for part in self.parts:
            if not part.path.is_file():
                download(f"{self.url}/{part.path.name}", part.path)

    def clear(self) -> None:
        """Remove the plan and the parts."""
        if self.url is not None:
            remove_objects(self.url)
        shutil.rmtree(self.folder, ignore_errors=True)


def read_parts(
    teacher: Teacher,
    request: Request,
    plan: PartPlan,
    parts: Sequence[Part],
    batch_tokens: int | None = None,  # instead of the plan's
    progress: Callable[[float], None] = lambda concepts: None,  # given each batch's concepts, 1 / templates each
) -> dict[str, float]:
    """Read parts of a request and write each as it is finished.

    Threads tokenize the next part and write the last one while the teacher works.

    Returns:
        Time, tokens and speed as MLflow metrics.

    Raises:
        InputError: a concept without tokens, or vectors that overflow in the teacher's precision.
        WorkError: out of memory even with one prompt at a time.
    """
    if not parts:
        return {}
    templates = len(request.templates)
    reader = Reader(teacher, request, batch_tokens or plan.batch_tokens, lambda prompts: progress(prompts / templates))

    def tokenize_part(part: Part) -> list[list[Prompt]]:
        concepts = request.concepts[part.start : part.stop]
        return [tokenize(teacher, concepts, template) for template in request.templates]

    begin, total_tokens = time.perf_counter(), 0
    with ThreadPoolExecutor(1) as tokenizing, ThreadPoolExecutor(1) as writing:
        next_prompts = tokenizing.submit(tokenize_part, parts[0])
        written: Future[None] | None = None
        for part, next_part in zip_longest(parts, parts[1:]):
            prompts = next_prompts.result()
            if next_part is not None:
                next_prompts = tokenizing.submit(tokenize_part, next_part)
            values, tokens = reader.read(prompts)
            isolated = reader.read_isolated_tokens(prompts[0])
            if written is not None:
                written.result()
            written = writing.submit(_write_part, teacher, request, plan, part, prompts, *_to_host(values), isolated)
            total_tokens += tokens
        assert written is not None
        written.result()
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "tokens": total_tokens,
        "concepts_per_second": sum(part.stop - part.start for part in parts) / seconds,
        "tokens_per_second": total_tokens / seconds,
        "flops_per_second": total_tokens * flops_per_token(teacher, request.layers) / seconds,
    }


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The values in host memory, and on a GPU the event after which they are there."""
    if not values.is_cuda:
        return values, None
    on_host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return on_host, copied


def _write_part(
    teacher: Teacher,
    request: Request,
    plan: PartPlan,
    part: Part,
    prompts: Sequence[Sequence[Prompt]],
    values: Tensor,
    copied: torch.cuda.Event | None,
    isolated: NDArray[np.float32],
) -> None:
    if copied is not None:
        copied.synchronize()
    vectors = values.numpy()
    is_finite = np.isfinite(vectors).all(axis=(1, 2, 3))
    if not is_finite.all():
        concept = request.concepts[part.start + int(is_finite.argmin())]
        raise InputError(f"--dtype {request.dtype}: the vector of {concept!r} is not finite in it; try --dtype float32")
    token_ids = RaggedArray.from_lists([prompt.concept_ids for prompt in prompts[0]])
    vocab = np.unique(token_ids.values)
    embeddings = teacher.embedding_table[torch.from_numpy(vocab).to(teacher.device)].float().cpu().numpy()
    is_first = [[prompt.pooled(request.pool)[0] == 0 for prompt in of_template] for of_template in prompts]
    tensors = {
        "vectors": vectors,
        "token_ids": token_ids.values,
        "token_lengths": token_ids.lengths,
        "token_vocab": vocab,
        "token_embeddings": embeddings,
        "token_activations": isolated,
        "in_sink": np.any(is_first, axis=0),
        "peaks": np.array([np.abs(table).max(initial=0) for table in (embeddings, vectors, isolated)]),
    }
    write_atomically(part.path, lambda path: save_file(tensors, path))
    plan.publish(part)


def merge(request: Request, plan: PartPlan) -> list[str]:
    """Join all parts to the vectors file and remove them.

    Several workers may do so at once: each writes the same bytes and renames them into place.

    Returns:
        The concepts whose vector was read at position 0; none where another worker has merged.

    Raises:
        WorkError: parts are missing.
        InputError: a part is damaged, or the file cannot be written.
        OSError: a part cannot be read.
    """
    output = plan.output

    def is_merged() -> bool:
        return is_extracted(output, request, read_output_header(output))

    if missing := plan.missing():
        if is_merged():
            return []
        raise WorkError(
            f"{output}: {len(missing)} of {len(plan.parts)} parts are not extracted yet; run the shards that are left"
        )
    try:
        in_sink = _join(request, plan)
    except (OSError, InputError):
        if not is_merged():
            raise
        in_sink = []
    plan.clear()
    return in_sink


def _join(request: Request, plan: PartPlan) -> list[str]:
    """Write the vectors file from its parts, in memory that does not grow with them."""

    def each(name: str) -> Iterator[NDArray[Any]]:
        for part in plan.parts:
            with safe_open(part.path, framework="np") as file:
                yield file.get_tensor(name)

    def table(name: str, vocab: NDArray[Any], peak: float) -> NDArray[Any]:
        values = np.empty((len(vocab), d_model), stored_dtype(peak))
        for types, own in zip(each("token_vocab"), each(name), strict=True):
            if len(own):
                values[np.searchsorted(vocab, types)] = own
        return values

    plan.collect()
    peaks = np.stack(list(each("peaks"))).max(0)
    offsets = np.cumsum([0, *np.concatenate(list(each("token_lengths")))], dtype=np.int64)
    vocab = np.unique(np.concatenate(list(each("token_vocab"))))
    isolated = vocab if request.token_block is not None else vocab[:0]
    d_model = next(each("vectors")).shape[-1]
    shape = (plan.rows, len(request.templates), len(request.layers), d_model)
    tensors = [
        StreamedTensor("token_ids", np.dtype(np.int64), (int(offsets[-1]),), lambda: each("token_ids")),
        stream_array("token_offsets", offsets),
        stream_array("token_vocab", vocab),
        stream_array("token_embeddings", table("token_embeddings", vocab, peaks[0])),
        stream_array("token_activations", table("token_activations", isolated, peaks[2])),
        StreamedTensor("vectors", stored_dtype(peaks[1]), shape, lambda: each("vectors")),
    ]
    assert tuple(tensor.name for tensor in tensors) == TENSORS
    in_sink = np.concatenate(list(each("in_sink")))
    is_pt = plan.output.path.suffix == ".pt"
    path = plan.folder / "whole.safetensors" if is_pt else plan.output.path
    write_atomically(path, lambda part: write_streamed(part, request.header, tensors))
    if is_pt:
        write_vectors(read_vectors(path), plan.output.path)
    plan.output.publish()
    return [request.concepts[row] for row in np.flatnonzero(in_sink)]
