"""A vectors file as candidates of a search: memory-mapped, and read a chunk at a time."""

from __future__ import annotations

import json
import logging
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.student.lookup import FloatArray
from pipeline.student.nearest import CHUNK_BYTES, Candidates, unit

MAX_HEADER_BYTES = 100_000_000  # as in safetensors
DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
log = logging.getLogger(__name__)


class VectorsFile(NamedTuple):
    """An open vectors file."""

    names: list[str]
    layers: list[int]
    templates: list[str]
    revision: str
    pool: str
    pages: mmap.mmap
    vectors: NDArray[np.floating[Any]]  # [concepts, templates, layers, d_model]


def stored_candidates(path: Path, config: Mapping[str, Any], mean: FloatArray) -> Candidates:
    """Open the vectors of a vectors file at a student's block and template.

    The header and the values that a search reads are checked, and not the checksums: those take a pass over the whole
    file.

    Args:
        path: the vectors file.
        config: of the student.
        mean: of the student's training vectors, ``[d_model]``.

    Returns:
        The file's concepts, centred by the mean.

    Raises:
        InputError: no vectors file, one without the student's block, or of another width.
    """
    file = _open(path)
    layer, names = config["layer"], file.names
    if layer not in file.layers:
        raise InputError(
            f"vectors file {path}: has the blocks {file.layers}; the student's vectors are of block {layer}"
        )
    if (width := file.vectors.shape[3]) != len(mean):
        raise InputError(f"vectors file {path}: vectors of width {width}; the student's have {len(mean)}")
    for what, own, others in (
        ("weights", config["revision"], [file.revision]),
        ("prompt", config["template"], file.templates),
        ("pooling", config["pool"], [file.pool]),
    ):
        if own not in others:
            log.warning("warning: vectors file %s: another %s (%s) than the student's (%s)", path, what, others[0], own)
    template = file.templates.index(config["template"]) if config["template"] in file.templates else 0
    chosen = file.vectors[:, template, file.layers.index(layer)]  # [concepts, d_model]
    step = max(
        1, CHUNK_BYTES // (file.vectors.strides[0] or 1)
    )  # concepts whose vectors of all blocks are mapped at once

    def directions(start: int, stop: int) -> FloatArray:
        values = np.empty((stop - start, len(mean)), np.float32)
        for begin in range(start, stop, step):
            values[begin - start : begin - start + step] = chosen[begin : min(begin + step, stop)]
            if hasattr(mmap, "MADV_DONTNEED"):  # what has been read need not stay among this process's pages
                file.pages.madvise(mmap.MADV_DONTNEED)
        if not np.isfinite(values).all():
            place = start + int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            raise InputError(f"vectors file {path}: {names[place]!r} has values that are not finite; extract it again")
        values -= mean
        return unit(values)

    return Candidates(names, directions)


def _open(path: Path) -> VectorsFile:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= MAX_HEADER_BYTES else {}
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        about, entry = header["__metadata__"], header["vectors"]
        names, layers, templates = (json.loads(about[name]) for name in ("concepts", "layers", "templates"))
        dtype, shape, offset = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"][0]
        if shape[:3] != [len(names), len(templates), len(layers)] or len(shape) != 4 or min(*shape, offset) < 0:
            raise ValueError(f"vectors of the shape {shape}")
        lists = all(isinstance(part, list) for part in (names, layers, templates))
        if not (lists and all(isinstance(name, str) for name in names)):
            raise ValueError("concepts that are no texts")
        vectors: NDArray[np.floating[Any]] = np.frombuffer(pages, dtype, math.prod(shape), 8 + size + offset)
        revision, pool = str(about["revision"]), str(about["pool"])
    except OSError as error:
        raise InputError(f"vectors file {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"vectors file {path}: damaged, or not a vectors file ({error})") from error
    return VectorsFile(names, layers, templates, revision, pool, pages, vectors.reshape(shape))
