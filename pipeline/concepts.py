"""The catalogue of concepts, the order in which subsets are taken from it, and its split.

A catalogue is a CSV file with the columns ``concept`` and ``category``, or ``wordfreq:<language>:<n>``, the n most
frequent words of a language.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import snowballstemmer

from pipeline.errors import InputError, choices
from pipeline.storage import fetch

SPLITS = ("train", "val", "test")
HELD_OUT = 200  # concepts in each of validation and test, where the catalogue is large enough
HELD_OUT_SHARE = 0.1  # the most that each may take of a smaller catalogue

# Words that two phrases may share without sharing a meaning: "point of view" tells nothing about "sense of humour".
FUNCTION_WORDS = frozenset(
    "a an and at by for from in of off on or out s the to up with".split()  # noqa: SIM905 (reads better)
)

STEMMERS = {
    "da": "danish",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "hu": "hungarian",
    "it": "italian",
    "nb": "norwegian",
    "nl": "dutch",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sv": "swedish",
    "tr": "turkish",
}


@dataclass(frozen=True)
class Catalogue:
    """Concepts with their categories, row by row.

    Attributes:
        concepts: the words or phrases, unique in any letter case.
        categories: the category of each concept, of equal length.
        language: the language code whose stemmer groups the concepts.
    """

    concepts: tuple[str, ...]
    categories: tuple[str, ...]
    language: str = "en"

    def __len__(self) -> int:
        return len(self.concepts)

    def first(self, count: int) -> list[int]:
        """Row numbers, ascending, of the first ``count`` concepts in `balanced_order`.

        Raises:
            InputError: the catalogue has fewer concepts.
        """
        if count > len(self):
            raise InputError(f"--num-concepts {count}: the catalogue has {len(self)} concepts")
        return sorted(balanced_order(self.concepts, self.categories)[:count])


def read_catalogue(source: str, language: str | None = None) -> Catalogue:
    """Read a catalogue from a CSV file or from word frequencies.

    Args:
        source: place of a CSV file with the columns ``concept,category``, or ``wordfreq:<language>:<n>``.
        language: of the concepts, whose stemmer keeps related ones together; English, or what the source names.

    Raises:
        InputError: the source is missing, empty, not UTF-8, lacks a column, or names a concept twice; or a language
            without a stemmer, or another one than the source names.
    """
    if language is not None and language not in STEMMERS:
        raise choices("language", language, STEMMERS)
    if not source.startswith("wordfreq:"):
        return replace(_read_csv(fetch(source)), language=language or "en")
    found = _read_wordfreq(source)
    if language not in (None, found.language):
        raise InputError(f"--language {language}: --concepts {source} are words of {found.language!r}")
    return found


def _read_csv(path: Path) -> Catalogue:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"concepts file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"concepts file {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    rows = csv.DictReader(text.splitlines())
    if rows.fieldnames is None or not {"concept", "category"} <= set(rows.fieldnames):
        raise InputError(
            f"concepts file {path}: expected a header line 'concept,category', found {text.split(chr(10))[0][:80]!r}"
        )
    concepts: list[str] = []
    categories: list[str] = []
    seen: dict[str, int] = {}
    for row in rows:
        concept, category = (row["concept"] or "").strip(), (row["category"] or "").strip()
        where = f"concepts file {path}, line {rows.line_num}"
        if not concept or not category or None in row:
            raise InputError(f"{where}: expected two values 'concept,category', found {','.join(_flat(row))!r}")
        if "\x00" in concept:
            raise InputError(f"{where}: a concept with a null byte")
        if (before := seen.setdefault(concept.casefold(), rows.line_num)) != rows.line_num:
            raise InputError(f"{where}: {concept!r} stands already at line {before}; name each concept once")
        concepts.append(concept)
        categories.append(category)
    if not concepts:
        raise InputError(f"concepts file {path}: no concepts below the header line")
    return Catalogue(tuple(concepts), tuple(categories))


def _flat(row: dict[str | None, str | list[str] | None]) -> list[str]:
    return [part for value in row.values() for part in (value if isinstance(value, list) else [value or ""])]


def _read_wordfreq(source: str) -> Catalogue:
    parts = source.split(":")
    if len(parts) != 3 or not parts[2].isdigit() or int(parts[2]) < 1:
        raise InputError(f"--concepts {source}: expected wordfreq:<language>:<number of words>")
    language, count = parts[1], int(parts[2])
    if language not in STEMMERS:
        raise choices("wordfreq language", language, STEMMERS)
    wordfreq = importlib.import_module("wordfreq")  # only here: a logged student carries this file and needs no words
    # Numbers and single letters are frequent in running text and are not concepts.
    words = (word for word in wordfreq.iter_wordlist(language, "best") if word.isalpha() and len(word) > 1)
    chosen = [word for word, _ in zip(words, range(count), strict=False)]
    if len(chosen) < count:
        raise InputError(f"--concepts {source}: wordfreq knows {len(chosen)} words of {language!r}")
    return Catalogue(tuple(chosen), ("word",) * count, language)


def balanced_order(concepts: Sequence[str], categories: Sequence[str]) -> list[int]:
    """Row numbers in an order whose every prefix is spread over all categories.

    The categories take turns; within a category the order is that of a hash of the concept, so it does not depend on
    the order of rows, and a prefix of a prefix is the prefix of the whole.
    """
    by_category: dict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(concepts)), key=lambda row: _digest("order", concepts[row])):
        by_category[categories[row]].append(row)
    turns = [
        (turn, _digest("order", category), row)
        for category, rows in by_category.items()
        for turn, row in enumerate(rows)
    ]
    return [row for _, _, row in sorted(turns)]


def _digest(purpose: str, text: str) -> bytes:
    """A fixed random number for a text; another for every purpose, so that order and split are independent."""
    return hashlib.sha256(f"{purpose}\n{text.casefold()}".encode()).digest()


def stems(concept: str, language: str = "en") -> set[str]:
    """The stems of a concept's words, without function words (Snowball stemmer, Porter 2001)."""
    words = re.findall(r"[^\W_]+", concept.casefold())
    content = [word for word in words if word not in FUNCTION_WORDS] or words
    stemmer = snowballstemmer.stemmer(STEMMERS[language])
    return set(stemmer.stemWords(content)) or {concept.casefold()}


def stem_groups(concepts: Sequence[str], language: str = "en") -> list[list[int]]:
    """Row numbers grouped so that concepts which share a word stem, directly or through others, are together."""
    parent = list(range(len(concepts)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_with: dict[str, int] = {}
    for row, concept in enumerate(concepts):
        for stem in stems(concept, language):
            parent[root(row)] = root(first_with.setdefault(stem, row))
    groups: dict[int, list[int]] = defaultdict(list)
    for row in range(len(concepts)):
        groups[root(row)].append(row)
    return list(groups.values())


def split(catalogue: Catalogue) -> list[str]:
    """The split of each concept: "train", "val" or "test".

    About `HELD_OUT` concepts each go to validation and to test, every category in proportion; concepts that share a
    word stem go to the same side. The result depends on the set of concepts only: groups are visited in the order of
    a hash and each takes the first side that has room in all of its categories, so a family of many phrases trains.
    """
    sizes = Counter(catalogue.categories)
    room = {side: _quotas(sizes) for side in ("test", "val")}
    sides = ["train"] * len(catalogue)
    groups = stem_groups(catalogue.concepts, catalogue.language)
    place = [_digest("split", concept) for concept in catalogue.concepts]
    for group in sorted(groups, key=lambda group: min(place[row] for row in group)):
        wanted = Counter(catalogue.categories[row] for row in group)
        side = next((s for s in room if all(room[s][c] >= n for c, n in wanted.items())), "train")
        for row in group:
            sides[row] = side
        if side != "train":
            room[side].subtract(wanted)
    return sides


def by_categories(concepts: Sequence[str], categories: Sequence[str], language: str = "en") -> list[str]:
    """A second split that holds out whole categories, one in five each for validation and test, at least one.

    Concepts of another category that share a word stem with a held-out one are left out of training ("none").
    """
    names = sorted(set(categories), key=lambda category: _digest("category", category))
    held = max(1, len(names) // 5)
    if len(names) < 3:
        raise InputError(f"--split categories: needs 3 categories at the least, found {len(names)}")
    side_of = dict.fromkeys(names, "train") | dict.fromkeys(names[:held], "test")
    side_of |= dict.fromkeys(names[held : 2 * held], "val")
    found = [side_of[category] for category in categories]
    for group in stem_groups(concepts, language):
        if len(own := {found[row] for row in group}) > 1:
            kept = "test" if "test" in own else "val"
            for row in group:
                found[row] = found[row] if found[row] == kept else "none"
    return found


def _quotas(sizes: Counter[str]) -> Counter[str]:
    """Held-out concepts by category, in proportion to its size (largest remainders)."""
    total = sum(sizes.values())
    held_out = min(HELD_OUT, int(HELD_OUT_SHARE * total))
    exact = {category: held_out * size / total for category, size in sizes.items()}
    quotas = Counter({category: int(share) for category, share in exact.items()})
    by_remainder = sorted(exact, key=lambda category: (quotas[category] - exact[category], category))
    quotas.update(by_remainder[: held_out - quotas.total()])
    return quotas


def counts(sides: Iterable[str]) -> dict[str, int]:
    """How many concepts each split has, in the order train, val, test."""
    found = Counter(sides)
    return {side: found[side] for side in SPLITS}
