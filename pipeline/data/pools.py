"""Pools of concepts: several sources joined to one catalogue, of which a judge alone decides what is held out.

A source is a CSV catalogue (``.csv``, ``.tsv``), ``wordfreq:<language>:<n>``, or a text file of one phrase a line. The
judge's validation and test concepts are those of its own split, however many concepts the pools have, so that students
of 700 and of 700,000 concepts are measured alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from pipeline.data import lists
from pipeline.data.concepts import Catalogue, Source, check_language, compute_split, read_catalogue, share_stems
from pipeline.errors import InputError
from pipeline.storage import fetch
from pipeline.student.tokenizer import normalise_texts

SHOWN = 3  # concepts that a line names
PHRASE = "phrase"  # the category of what a text file lists
COLUMNS = ("concept", "category")


def source_names(given: Sequence[str]) -> list[str]:
    """Split values at commas, but for one that names a file; an `InputError` where a name is empty or given twice."""
    names = [name.strip() for value in given for name in ([value] if Path(value).is_file() else value.split(","))]
    for name in names:
        if not name:
            raise InputError(f"--concepts {','.join(given)!r}: expected sources with commas between them")
        if names.count(name) > 1:
            raise InputError(f"--concepts {name}: given twice")
    return names


def read_pools(
    names: Sequence[str], judge: str | None = None, language: str | None = None
) -> tuple[Catalogue, list[str]]:
    """Read sources and join them.

    Concepts stand in the order of the sources, the judge's first. One that several sources name, or a text file several
    times, is taken once. Of the pools, what shares a word stem with a held-out concept of the judge is left out.

    Args:
        names: the sources.
        judge: one of them, or a further one; default: of several sources the first, if that is a table.
        language: of all concepts; default: that of wordfreq sources, or English.

    Returns:
        The catalogue, and a line for each source of which something is left out.

    Raises:
        InputError: a source that cannot be read or has no concepts, or sources in different languages.
    """
    if judge is None and len(names) > 1 and lists.is_table(names[0]):
        judge = names[0]
    ordered = list(names) if judge is None else [judge, *(name for name in names if name != judge)]
    read = [_read_source(name, language) for name in ordered]
    for name, own in zip(ordered, read, strict=True):
        if own.language != read[0].language:
            words = f"words of {own.language!r}, and {ordered[0]} is read as {read[0].language!r}"
            raise InputError(f"--concepts {name}: {words}; give one --language for all")
    seen: set[str] = set()
    parts: list[Catalogue] = []
    lines = []
    for name, own in zip(ordered, read, strict=True):
        part = own.take(_new_rows(own.concepts, seen))
        if not parts and not _is_text(name):
            part = own  # an extraction of this source alone has all of its rows
        left_out = {"named before": len(own) - len(part)}
        if parts and judge is not None:
            split = compute_split(parts[0])
            leaks = share_stems(part.concepts, parts[0], split, split.sides)
            shown = ", ".join([part.concepts[row] for row, leak in enumerate(leaks) if leak][:SHOWN])
            part = part.take([row for row, leak in enumerate(leaks) if not leak])
            left_out[f"with a word of a held-out concept ({shown}, ...)"] = sum(leaks)
        parts.append(part)
        if reasons := ", ".join(f"{number:,} {reason}" for reason, number in left_out.items() if number):
            lines.append(f"{name}: {len(part):,} of {len(own):,} concepts are taken; left out: {reasons}")
    return _join(ordered, parts, judge or ""), lines


def _join(names: Sequence[str], parts: Sequence[Catalogue], judge: str) -> Catalogue:
    sources = tuple(Source(name, len(part)) for name, part in zip(names, parts, strict=True))
    concepts = tuple(chain.from_iterable(part.concepts for part in parts))
    categories = tuple(chain.from_iterable(part.categories for part in parts))
    joined = Catalogue(concepts, categories, parts[0].language, sources, judge)
    return joined.take(range(len(joined)))  # leaves out what has become empty


def _new_rows(concepts: Iterable[str], seen: set[str]) -> list[int]:
    """Rows of concepts that were not seen before, in any letter case; all are seen afterwards."""
    rows = []
    for row, name in enumerate(map(lists.canonical, concepts)):
        if name not in seen:
            seen.add(name)
            rows.append(row)
    return rows


def _is_text(source: str) -> bool:
    return not source.startswith("wordfreq:") and not lists.is_table(source)


def _read_source(source: str, language: str | None) -> Catalogue:
    """Read one source; phrases of a text file may stand there several times."""
    if not _is_text(source):
        return read_catalogue(source, language)
    check_language(language)
    name = f"concepts file {source}"
    with lists.opened(fetch(source), name) as file:
        numbered = list(lists.texts(file, name))
    if not numbered:
        raise InputError(f"{name}: no concepts")
    first, text = numbered[0]
    if lists.is_header(text, COLUMNS):
        raise InputError(f"{name}, line {first}: the header of a table; name the file .csv or .tsv")
    phrases = normalise_texts((text for _, text in numbered), lambda row: f"{name}, line {numbered[row][0]}")
    return Catalogue(tuple(phrases), (PHRASE,) * len(phrases), language or "en")
