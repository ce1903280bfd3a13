"""Benchmarks' files as tasks, in the formats in which people have them. Wrong lines are named in one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.benchmarks.tasks import MIN_POSITIVES, Analogies, Attributes, Categories, Ratings, Rows, Similarity
from pipeline.data import lists
from pipeline.errors import InputError
from pipeline.student.tokenizer import normalise_texts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, without comments and empty ones."""
    for number, line in enumerate(lists.whole(path, f"benchmark {path}").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line


def _fields(line: str) -> list[str]:
    """The values of a line, between tabs, commas or blanks."""
    separator = next((one for one in "\t," if one in line), None)
    return [value.strip() for value in line.split(separator)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _phrases(words: Sequence[str]) -> tuple[tuple[str, ...], Rows]:
    """The distinct phrases, and the row of each word among them."""
    rows: dict[str, int] = {}
    places = [rows.setdefault(word, len(rows)) for word in normalise_texts(words)]
    return tuple(rows), np.array(places, np.int64)


def read_similarity(path: Path, column: int = 2) -> Similarity:
    """Read a pair and its rating a line, between tabs, commas or blanks; a first line of titles is skipped.

    Args:
        path: the file.
        column: of the rating, from 0.

    Returns:
        The task.

    Raises:
        InputError: a line without two words and a rating.
    """
    words: list[str] = []
    ratings: list[float] = []
    for number, line in _lines(path):
        fields = _fields(line)
        rating = _number(fields[column]) if len(fields) > column else None
        if rating is None:
            if not words and number == 1:
                continue
            raise InputError(f"benchmark {path}, line {number}: expected two words and a rating, found {line[:60]!r}")
        words += fields[:2]
        ratings.append(rating)
    if not ratings:
        raise InputError(f"benchmark {path}: no pairs of words")
    phrases, rows = _phrases(words)
    return Similarity(phrases, rows.reshape(-1, 2), np.array(ratings))


def read_analogies(path: Path) -> Analogies:
    """Read four words a line; lines that begin with a colon name the kind of the questions below them."""
    words: list[str] = []
    for number, line in _lines(path):
        if line.startswith(":"):
            continue
        if len(fields := line.split()) != 4:
            raise InputError(f"benchmark {path}, line {number}: expected four words, found {line[:60]!r}")
        words += fields
    if not words:
        raise InputError(f"benchmark {path}: no questions")
    phrases, rows = _phrases(words)
    return Analogies(phrases, rows.reshape(-1, 4))


def read_categories(path: Path) -> Categories:
    """Read a word and its category a line, or a folder with a file per category and a word a line."""
    pairs: list[tuple[str, str]] = []
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            pairs += [(line.strip(), file.stem) for _, line in _lines(file)]
    else:
        for number, line in _lines(path):
            if len(fields := _fields(line)) < 2:
                raise InputError(f"benchmark {path}, line {number}: expected a word and its category")
            pairs.append((fields[0], fields[1]))
    known = dict(pairs)  # a word of two categories counts in the last
    if len(set(known.values())) < 2:
        raise InputError(f"benchmark {path}: expected words of two categories at the least")
    phrases, rows = _phrases(list(known))
    labels = np.unique(list(known.values()), return_inverse=True)[1].astype(np.int64)
    return Categories(phrases, labels[np.unique(rows, return_index=True)[1]])


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of a table with titles, between tabs or commas."""
    lines = lists.whole(path, f"benchmark {path}").splitlines()
    return list(csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ","))


def _column(row: dict[str, str], path: Path, *names: str) -> str:
    """The first of some columns that a table has."""
    for name in names:
        if name in row:
            return name
    raise InputError(f"benchmark {path}: expected a column {' or '.join(names)}, found {', '.join(row)[:200]}")


def read_ratings(path: Path, scales: Sequence[Sequence[str]], phrases: bool | None = None) -> Ratings:
    """Read a table with a column of phrases and one per scale.

    Args:
        path: a CSV file, or one with tabs.
        scales: the titles that each scale may have; scales that the table lacks are left out.
        phrases: ask for phrases of several words by a probe that is fitted on single words; else for words alone.

    Returns:
        The task.

    Raises:
        InputError: a table without such columns or rows.
    """
    if not (table := _table(path)):
        raise InputError(f"benchmark {path}: no rows")
    word = _column(table[0], path, "Word", "word", "Expression", "phrase")
    found = [name for names in scales if (name := next((one for one in names if one in table[0]), ""))]
    if not found:
        _column(table[0], path, *scales[0])
    rated: dict[str, list[float]] = {}
    for row in table:
        values = [number for name in found if (number := _number(row[name] or "")) is not None]
        if len(values) == len(found) and row[word].strip():
            rated.setdefault(row[word].strip().lower(), values)
    words = [text for text in rated if " " not in text]
    chosen = words + ([text for text in rated if " " in text] if phrases else [])
    if len(chosen) <= len(words) * bool(phrases):
        raise InputError(f"benchmark {path}: no rated {'phrases of several words' if phrases else 'words'}")
    known, rows = _phrases(chosen)
    ratings = np.array([rated[text] for text in chosen])[np.unique(rows, return_index=True)[1]]
    return Ratings(known, ratings, len(words) if phrases else 0)


def read_features(path: Path) -> Attributes:
    """Read a concept and one of its features a line of a table with titles."""
    table = _table(path)
    if not table:
        raise InputError(f"benchmark {path}: no rows")
    concept, feature = (_column(table[0], path, name.title(), name) for name in ("concept", "feature"))
    return _attributes(path, [(row[concept].replace("_", " "), row[feature]) for row in table])


def read_entities(path: Path) -> Attributes:
    """Read a JSON object of entities, each an object of attributes with their values."""
    try:
        entities = json.loads(lists.whole(path, f"benchmark {path}"))
        pairs = [(name, f"{key}={value}") for name, own in entities.items() for key, value in own.items()]
    except (ValueError, AttributeError) as error:
        raise InputError(f"benchmark {path}: expected an object of entities with attributes ({error})") from error
    return _attributes(path, pairs)


def _attributes(path: Path, pairs: Sequence[tuple[str, str]]) -> Attributes:
    phrases, rows = _phrases([phrase for phrase, _ in pairs])
    names, columns = np.unique([name for _, name in pairs], return_inverse=True)
    has = np.zeros((len(phrases), len(names)), np.bool_)
    has[rows, columns] = True
    number = has.sum(0)
    has = has[:, (number >= MIN_POSITIVES) & (number < len(phrases))]
    if not has.shape[1]:
        raise InputError(f"benchmark {path}: no attribute that at least {MIN_POSITIVES} of the phrases have")
    return Attributes(phrases, has)
