"""What is asked of an extraction, and whether it stands at the output already.

A request is known by a hash of all that decides its vectors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.concepts import Catalogue, split
from pipeline.data.vectors import FORMAT, HEADER_DEFAULTS, parse_header, read_header, read_unverified_header
from pipeline.errors import InputError, choices
from pipeline.storage import Output, beginning
from pipeline.student.tokenizer import nfc
from pipeline.teachers.find import Source, parse_layers

POOLS = ("last", "mean")
# What the key says of the computation: raised by hand (activation-vectors-3.1, ...) whenever an extraction gives other
# vectors for the same request. `FORMAT` tells only whether a file can be read.
EXTRACTION_VERSION = "activation-vectors-3"
MOST_HEADER_BYTES = 1 << 30
COMPARED = ("teacher", "revision", "concepts", "layers", "templates", "pool", "dtype", "token_block")
MOST_LISTED = 8
_VECTORS = Path(__file__).parents[2] / "data" / "vectors"
SHIPPED_FILES = {_VECTORS / f"{name}.safetensors" for name in ("smollm2-135m", "smollm2-135m-templates")}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be extracted, with all that decides the vectors.

    ``reader`` is 2 for teachers that the program once read otherwise: in some batches a state ran from one prompt into
    the next, and GGUF files lost the token in front. What was extracted then does not answer the request.
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

    @cached_property
    def key(self) -> str:
        """Hash of the request; the teacher counts by its weights and tokenizer, and not by its name."""
        content = {name: value for name, value in self._said.items() if name != "teacher"}
        content["format"] = EXTRACTION_VERSION
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def _said(self) -> dict[str, Any]:
        """Its values, without those that keys and headers leave out."""
        left_out = HEADER_DEFAULTS | {"reader": 1}
        return {name: value for name, value in asdict(self).items() if (name, value) not in left_out.items()}

    def is_answered_by(self, header: Mapping[str, str] | None) -> bool:
        """Whether a vectors file with this header answers the request; of its tokenizer an older file says nothing."""
        held = header or {}
        asked = self if "tokenizer" in held else replace(self, tokenizer="")
        return held.get("extraction_key") in (self.key, asked.key)

    @property
    def header(self) -> dict[str, str]:
        """The header of its vectors file, without checksums."""
        values = {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in self._said.items()
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
        templates=tuple(map(nfc, templates)),
        teacher=source.name,
        revision=source.revision,
        pool=pool,
        dtype=source.dtype,
        depth=source.depth,
        token_block=token_block,
        language=catalogue.language,
        tokenizer=source.tokenizer,
        reader=1 if source.was_read_rightly else 2,
    )


def check_prompts(templates: Sequence[str], pool: str) -> None:
    """Check how concepts are to be put to the teacher.

    Raises:
        InputError: a template without ``{concept}``, one given twice, or an unknown pool.
    """
    for template in templates:
        if template.count("{concept}") != 1:
            raise InputError(f"--template {template!r}: expected {{concept}} exactly once")
    if len(set(map(nfc, templates))) < len(templates):
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
    if output.path.suffix == ".pt" or not request.is_answered_by(header_of(output)):
        return False
    try:
        return output.url is not None or bool(read_header(output.path))
    except InputError:
        return False


def as_merged(output: Output, request: Request) -> Request:
    """The request in the precision that other shards took, where they have merged already; else as it is."""
    header = header_of(output) or {}
    merged = replace(request, dtype=header.get("dtype", request.dtype))
    return merged if merged.is_answered_by(header) else request


def check_output(output: Output, request: Request, concepts: str, overwrite: bool) -> None:
    """Refuse to write over anything but the answer to this very request, unless the user says so.

    Args:
        output: where the vectors will be.
        request: what is asked for.
        concepts: the file of the concepts, as the user names it.
        overwrite: replace other vectors.

    Raises:
        InputError: something else stands there.
    """
    header = header_of(output)
    if header is None or (request.is_answered_by(header) and output.path.suffix != ".pt"):
        return
    if output.url is None and Path(concepts).exists() and output.path.samefile(concepts):
        raise InputError(f"--output {output}: that is the file of the concepts")
    if output.url is None and output.path.resolve() in SHIPPED_FILES:
        raise InputError(f"--output {output}: comes with the project ({_differences(header, request)}); name another")
    is_vectors = header.get("format", "").startswith(FORMAT.rstrip("0123456789"))  # those of older versions too
    if not is_vectors and output.path.suffix != ".pt":
        raise InputError(f"--output {output}: exists, and is no vectors file; remove it or name another")
    if not overwrite:
        raise InputError(
            f"--output {output}: holds other vectors ({_differences(header, request)}); name another, or replace them "
            "with --overwrite"
        )
    log.warning("%s: replaces other vectors (extraction key %s)", output, header.get("extraction_key", "?")[:12])


def _differences(header: dict[str, str], request: Request) -> str:
    """What a vectors file holds and what is asked for, where they differ."""
    asked = request.header
    names = [name for name in COMPARED if header.get(name) != asked[name]]
    if "tokenizer" in header and header["tokenizer"] != request.tokenizer:
        names.append("tokenizer")
    if not header:
        return "of a kind that does not say what it holds"
    told = [f"{name} {_brief(header.get(name))}, asked for {_brief(asked.get(name))}" for name in names]
    return "; ".join(told) or "of another version"


def _brief(value: str | None) -> str:
    """A header's value in few characters; of a long list its length."""
    if value is None:
        return "unknown"
    if not value.startswith("["):
        return value
    found = json.loads(value)
    return f"{len(found):,}" if len(found) > MOST_LISTED else ", ".join(map(str, found))
