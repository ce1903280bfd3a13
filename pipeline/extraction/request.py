"""What an extraction is asked for, known by a hash of all that decides its vectors, and what its output holds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.concepts import Catalogue, Source, split
from pipeline.data.vectors import (
    EXTRACTION_VERSION,
    FORMAT,
    HEADER_DEFAULTS,
    parse_header,
    read_header,
    read_unverified_header,
)
from pipeline.errors import InputError, choices
from pipeline.s3 import first_bytes
from pipeline.storage import Output
from pipeline.student.tokenizer import nfc
from pipeline.teachers.find import TeacherSource, parse_layers

POOLS = ("last", "mean")
MAX_HEADER_BYTES = 1 << 30
COMPARED_FIELDS = ("teacher", "revision", "concepts", "layers", "templates", "pool", "dtype", "token_block", "judge")
MAX_LISTED = 8  # of the values of a list in a message
_VECTORS = Path(__file__).parents[2] / "data" / "vectors"
SHIPPED_FILES = {_VECTORS / f"{name}.safetensors" for name in ("smollm2-135m", "smollm2-135m-templates")}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be extracted, with all that decides the vectors.

    ``reader`` is 2 for teachers that earlier versions read wrongly, whose old vectors do not answer the request: a
    state ran from one prompt into the next, and GGUF files lost the token in front.
    """

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
    language: str = "en"
    tokenizer: str = ""
    reader: int = 1
    sources: tuple[Source, ...] = ()
    judge: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of the request; teacher and sources count by what they hold, and not by their names."""
        content = self._written_fields | {"format": EXTRACTION_VERSION}
        del content["teacher"]
        if self.sources:
            content |= {"sources": [source.concepts for source in self.sources], "judge": bool(self.judge)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def _written_fields(self) -> dict[str, Any]:
        """All fields but those whose value is the one that keys and headers leave out."""
        left_out = HEADER_DEFAULTS | {"reader": 1, "sources": ()}
        return {name: value for name, value in asdict(self).items() if (name, value) not in left_out.items()}

    def is_answered_by(self, header: Mapping[str, str] | None) -> bool:
        """Whether a vectors file with this header answers the request; older files do not name their tokenizer."""
        found = header or {}
        asked = self if "tokenizer" in found else replace(self, tokenizer="")
        return found.get("extraction_key") in (self.key, asked.key)

    def in_merged_precision(self, header: Mapping[str, str] | None) -> Request:
        """The request in the precision of a vectors file that answers it so, merged by other shards; else itself."""
        merged = replace(self, dtype=(header or {}).get("dtype", self.dtype))
        return merged if merged.is_answered_by(header) else self

    @property
    def header(self) -> dict[str, str]:
        """The header of its vectors file, without checksums."""
        values = {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in self._written_fields.items()
        }
        return values | {"format": FORMAT, "extraction_key": self.key}


def make_request(
    source: TeacherSource,
    catalogue: Catalogue,  # whose split holds, whatever the count is
    *,
    layers: str,  # "mid", "all", or block numbers such as "8,15"; 0 is the embedding output
    templates: Sequence[str],  # prompts, each with {concept} exactly once
    pool: str = "last",  # the last token of the prompt; "mean" averages over the concept's tokens (in float32)
    count: int | None = None,  # the number of concepts, spread over the categories; all by default
    token_block: int | None = None,  # an early block at which to read each of the concepts' tokens by itself as well
) -> Request:
    """Make a request from what the user asks for, before anything slow begins; an InputError where it is wrong."""
    check_prompts(templates, pool)
    if token_block is not None and token_block > source.depth:
        raise InputError(f"--token-block {token_block}: the teacher has {source.depth} blocks")
    sides, rows = split(catalogue), catalogue.first(count) if count is not None else range(len(catalogue))
    chosen = catalogue.take(rows)
    return Request(
        concepts=chosen.concepts, categories=chosen.categories, splits=tuple(sides[row] for row in rows),
        layers=parse_layers(layers, source.depth), templates=tuple(map(nfc, templates)), teacher=source.name,
        revision=source.revision, pool=pool, dtype=source.dtype, depth=source.depth, token_block=token_block,
        language=catalogue.language, tokenizer=source.tokenizer, reader=1 if source.was_always_read_correctly else 2,
        sources=chosen.sources, judge=chosen.judge,
    )  # fmt: skip


def check_prompts(templates: Sequence[str], pool: str) -> None:
    """Refuse a template without ``{concept}``, one given twice, or an unknown pool."""
    for template in templates:
        if template.count("{concept}") != 1:
            raise InputError(f"--template {template!r}: expected {{concept}} exactly once")
    if len(set(map(nfc, templates))) < len(templates):
        raise InputError("--template: the same template twice")
    if pool not in POOLS:
        raise choices("pool", pool, POOLS)


def read_output_header(output: Output) -> dict[str, str] | None:
    """The header of the vectors file at an output, unverified; empty for any other file, None where there is none."""
    if output.url is None:
        return read_unverified_header(output.path) if output.path.is_file() else None
    head = first_bytes(output.url, 8)
    if head is None:
        return None
    length = 8 + int.from_bytes(head, "little")
    return {} if length > MAX_HEADER_BYTES else parse_header(first_bytes(output.url, length) or b"")


def is_extracted(output: Output, request: Request, header: dict[str, str] | None) -> bool:
    """Whether the output, which begins with ``header``, holds the whole answer (S3 shows no part of a file)."""
    if output.path.suffix == ".pt" or not request.is_answered_by(header):
        return False
    try:
        return output.url is not None or bool(read_header(output.path))
    except InputError:
        return False


def check_output(
    output: Output, request: Request, header: dict[str, str] | None, concepts: Sequence[str], overwrite: bool
) -> bool:
    """Whether the output holds the whole answer already; an InputError where it must not be overwritten."""
    is_pt = output.path.suffix == ".pt"
    if is_pt and (len(request.layers), len(request.templates)) != (1, 1):
        raise InputError(f"--output {output}: a .pt file holds one layer and one template; write .safetensors")
    if header is None or (request.is_answered_by(header) and not is_pt):
        return is_extracted(output, request, header)
    if output.url is None and any(Path(source).exists() and output.path.samefile(source) for source in concepts):
        raise InputError(f"--output {output}: that is the file of the concepts")
    if output.url is None and output.path.resolve() in SHIPPED_FILES:
        raise InputError(f"--output {output}: comes with the project ({_differences(header, request)}); name another")
    is_vectors = header.get("format", "").startswith(FORMAT.rstrip("0123456789"))  # of any version
    if not is_vectors and not is_pt:
        raise InputError(f"--output {output}: exists, and is no vectors file; remove it or name another")
    if not overwrite:
        raise InputError(
            f"--output {output}: holds other vectors ({_differences(header, request)}); name another, or replace them "
            "with --overwrite"
        )
    log.warning("%s: replaces other vectors (extraction key %s)", output, header.get("extraction_key", "?")[:12])
    return False


def _differences(header: dict[str, str], request: Request) -> str:
    """The fields in which a vectors file differs from a request, each with both values."""
    if not header:
        return "of a kind that does not say what it holds"
    asked = request.header
    names = [name for name in COMPARED_FIELDS if header.get(name) != asked.get(name)]
    if "tokenizer" in header and header["tokenizer"] != request.tokenizer:
        names.append("tokenizer")
    found, wanted = HEADER_DEFAULTS | header, HEADER_DEFAULTS | asked
    values = [f"{name} {_shorten(found.get(name))}, asked for {_shorten(wanted.get(name))}" for name in names]
    return "; ".join(values) or "of another version"


def _shorten(value: str | None) -> str:
    """A header's value, or the length of a long list."""
    if value == "":
        return "none"
    if value is None:
        return "unknown"
    if not value.startswith("["):
        return value
    values = json.loads(value)
    return f"{len(values):,}" if len(values) > MAX_LISTED else ", ".join(map(str, values))
