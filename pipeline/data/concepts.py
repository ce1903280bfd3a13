"""The catalogue of concepts, the order in which subsets are taken from it, and its split.

A catalogue is a CSV file with the columns ``concept`` and ``category``, or ``wordfreq:<language>:<n>``, the n most
frequent words of a language; `pipeline.data.pools` joins several.
"""

from __future__ import annotations

import hashlib
import importlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from pipeline.data import lists
from pipeline.data.stems import STEMMERS, connected_rows, group_keys, stem, stems, words
from pipeline.errors import InputError, choices
from pipeline.storage import fetch
from pipeline.student.tokenizer import casefolded, nfc, normalise_texts

SPLITS = ("train", "val", "test")
HELD_OUT = 200  # concepts in each of validation and test, where the catalogue is large enough
HELD_OUT_SHARE = 0.1  # the most that each may take of a smaller catalogue
MIN_HELD_OUT = 0.5  # share of the wanted held-out concepts below which common words are ignored
MAX_FAMILY = 4  # concepts that share a word stay together up to this number; so does all of the shipped catalogue


class Source(NamedTuple):
    """Where consecutive concepts of a catalogue come from."""

    name: str  # as the user gave it
    concepts: int  # their number


@dataclass(frozen=True)
class Catalogue:
    """Concepts with their categories, row by row."""

    concepts: tuple[str, ...]  # words or phrases, unique in any letter case and Unicode form
    categories: tuple[str, ...]
    language: str = "en"  # whose stemmer groups the concepts
    sources: tuple[Source, ...] = ()  # in the order of rows, where there are several
    judge: str = ""  # the first source, where it alone is split and all other concepts are for training

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def judged(self) -> Catalogue:
        """The concepts that are split: those of the judge, or all."""
        if not self.judge:
            return self
        number = self.sources[0].concepts
        return Catalogue(self.concepts[:number], self.categories[:number], self.language)

    def order(self) -> list[int]:
        """Order rows for nested subsets: `balanced_order` of the judged concepts, then the others by their hash."""
        judged = self.judged
        others = sorted(range(len(judged), len(self)), key=lambda row: _digest("order", self.concepts[row]))
        return balanced_order(judged.concepts, judged.categories) + others

    def first(self, count: int) -> list[int]:
        """Rows of the first concepts in `order`, ascending; raises `InputError` where there are fewer."""
        if count > len(self):
            raise InputError(f"--num-concepts {count}: the catalogue has {len(self)} concepts")
        return sorted(self.order()[:count])

    def take(self, rows: Sequence[int]) -> Catalogue:
        """Select rows, which ascend; what is left of one source alone is a catalogue of its own."""
        ends = [bisect_left(rows, end) for end in accumulate((one.concepts for one in self.sources), initial=0)]
        numbers = [stop - start for start, stop in pairwise(ends)]
        sources = tuple(Source(one.name, n) for one, n in zip(self.sources, numbers, strict=True) if n)
        concepts, categories = (tuple(column[row] for row in rows) for column in (self.concepts, self.categories))
        if len(sources) < 2:
            return Catalogue(concepts, categories, self.language)
        return Catalogue(concepts, categories, self.language, sources, self.judge)


def read_catalogue(source: str, language: str | None = None) -> Catalogue:
    """Read a catalogue from a CSV file or from word frequencies.

    Args:
        source: path or URL of a CSV file with the columns ``concept,category``, or ``wordfreq:<language>:<n>``.
        language: of the concepts, for the stemmer; default: that of the source, or English.

    Returns:
        The catalogue.

    Raises:
        InputError: the source is missing, empty, not text, lacks a column or a value, or names a concept twice; or a
            language without a stemmer, or another one than the source names.
    """
    check_language(language)
    if not source.startswith("wordfreq:"):
        return replace(_read_table(source), language=language or "en")
    found = _read_wordfreq(source)
    if language not in (None, found.language):
        raise InputError(f"--language {language}: --concepts {source} are words of {found.language!r}")
    return found


def check_language(language: str | None) -> None:
    """Refuse a language without a stemmer with `InputError`."""
    if language is not None and language not in STEMMERS:
        raise choices("language", language, STEMMERS)


def _read_table(source: str) -> Catalogue:
    name = f"concepts file {source}"
    with lists.opened(fetch(source), name) as file:
        rows = list(lists.table(file, name, ("concept", "category")))
    where = [f"{name}, line {line}" for line, _ in rows]
    # A line break within a value is how a spreadsheet shows a long phrase.
    concepts = normalise_texts((_on_one_line(concept) for _, (concept, _) in rows), where.__getitem__)
    seen: dict[str, int] = {}
    for place, concept in enumerate(concepts):
        if (first := seen.setdefault(lists.canonical(concept), place)) != place:
            found = f"{concept!r} stands already at line {rows[first][0]}"
            raise InputError(f"{where[place]}: {found}; name each concept once")
    if not rows:
        raise InputError(f"{name}: no concepts below the header line")
    return Catalogue(tuple(concepts), tuple(nfc(_on_one_line(category)) for _, (_, category) in rows))


def _on_one_line(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines())


def _read_wordfreq(source: str) -> Catalogue:
    parts = source.split(":")
    if len(parts) != 3 or not parts[2].isdigit() or int(parts[2]) < 1:
        raise InputError(f"--concepts {source}: expected wordfreq:<language>:<number of words>")
    language, count = parts[1], int(parts[2])
    if language not in STEMMERS:
        raise choices("wordfreq language", language, STEMMERS)
    wordfreq = importlib.import_module("wordfreq")  # only here: it takes a third of a second to load
    # Numbers and single letters are frequent in running text and are not concepts.
    candidates = (word for word in wordfreq.iter_wordlist(language, "best") if word.isalpha() and len(word) > 1)
    chosen = [word for word, _ in zip(candidates, range(count), strict=False)]
    if len(chosen) < count:
        raise InputError(f"--concepts {source}: wordfreq knows {len(chosen)} words of {language!r}")
    return Catalogue(tuple(chosen), ("word",) * count, language)


def balanced_order(concepts: Sequence[str], categories: Sequence[str]) -> list[int]:
    """Order rows so that every prefix is spread over all categories.

    The categories take turns; within a category the order is that of a hash of the concept, so it does not depend on
    the order of rows, and a prefix of a prefix is the prefix of the whole.

    Returns:
        Row numbers.
    """
    by_category: dict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(concepts)), key=lambda row: _digest("order", concepts[row])):
        by_category[categories[row]].append(row)
    turn_of = {row: turn for rows in by_category.values() for turn, row in enumerate(rows)}
    place_of = {category: _digest("order", category) for category in by_category}
    return sorted(turn_of, key=lambda row: (turn_of[row], place_of[categories[row]], row))


def _digest(purpose: str, text: str) -> bytes:
    """Hash a text to a fixed random number, another one for every purpose: order and split are independent."""
    return hashlib.sha256(f"{purpose}\n{casefolded(text)}".encode()).digest()


@dataclass(frozen=True)
class Split:
    """The split of a catalogue, with what limits it."""

    sides: list[str]  # of each concept: "train", "val" or "test"
    groups: list[list[int]]  # rows of the concepts that stay on one side
    common: list[str]  # words that were ignored when grouping, most frequent first
    ignored: frozenset[str]  # their stems
    wanted: int  # concepts that each of validation and test should have
    with_common: int  # concepts that the smaller of the two could have if the common words counted

    @property
    def warnings(self) -> list[str]:
        """A line for each limit that the user should know."""
        held_out, warnings = counts(self.sides), []
        if self.common:
            shown = ", ".join([*self.common[:5], *["..."][: len(self.common) - 5]])
            warnings.append(
                f"common words ({len(self.common):,}: {shown}) do not keep the concepts that share them on one side of "
                f"the split; else {self.with_common} of {self.wanted} could be held out for validation or for test"
            )
        if min(held_out["val"], held_out["test"]) < self.wanted:
            warnings.append(
                f"{held_out['val']} of {self.wanted} concepts are held out for validation and {held_out['test']} of "
                f"{self.wanted} for test: concepts that share a word, directly or through others, stay on one side, "
                f"and the largest such group has {max(map(len, self.groups)):,} of {len(self.sides):,}"
            )
        return warnings


def split(catalogue: Catalogue) -> list[str]:
    """Assign each concept to "train", "val" or "test": the sides of `compute_split`, and "train" what is not judged."""
    sides = compute_split(catalogue.judged).sides
    return sides + ["train"] * (len(catalogue) - len(sides))


def compute_split(catalogue: Catalogue) -> Split:
    """Split a catalogue, and say what limits the split.

    About `HELD_OUT` concepts each go to validation and to test, every category in proportion; concepts that share a
    word stem go to the same side. The result depends on the set of concepts only: groups are visited in the order of
    a hash and each takes the first side that has room in all of its categories, so a family of many phrases trains.

    Descriptions ("terms related to ...") share words that join them all to one group, of which nothing can be held
    out. So where less than `MIN_HELD_OUT` could be held out, the fewest words that most concepts share are ignored;
    the words of at most `MAX_FAMILY` concepts always count.

    Returns:
        The split.
    """
    concepts, categories = catalogue.concepts, catalogue.categories
    stems_by_row = [stems(concept, catalogue.language) for concept in concepts]
    frequency = Counter(stem for own in stems_by_row for stem in own)
    wanted = _quotas(Counter(categories)).total()

    @cache
    def assign(limit: int) -> tuple[list[str], list[list[int]]]:
        groups = connected_rows(stems_by_row, {stem for stem, number in frequency.items() if number > limit})
        return _assign_groups(groups, concepts, categories), groups

    def smaller_side(limit: int) -> int:
        found = counts(assign(limit)[0])
        return min(found["val"], found["test"])

    limit = max(frequency.values(), default=0)
    if (with_common := smaller_side(limit)) < MIN_HELD_OUT * wanted:
        limits = sorted({MAX_FAMILY, *(number for number in frequency.values() if number > MAX_FAMILY)})
        first_short = bisect_left(limits, True, key=lambda limit: smaller_side(limit) < MIN_HELD_OUT * wanted)
        largest = limits[max(0, first_short - 1)]
        limit = largest if smaller_side(largest) > with_common else limit
    sides, groups = assign(limit)
    common = [stem for number, stem in sorted((-number, stem) for stem, number in frequency.items()) if -number > limit]
    word_of = {stem(word, catalogue.language): word for concept in concepts for word in words(concept)}
    shown = [word_of.get(one, one) for one in common]
    return Split(sides, groups, shown, frozenset(common), wanted, with_common)


def _assign_groups(groups: Sequence[list[int]], concepts: Sequence[str], categories: Sequence[str]) -> list[str]:
    """Assign each concept to a side, those of a group together."""
    sizes = Counter(categories)
    room = {side: _quotas(sizes) for side in ("test", "val")}
    sides = ["train"] * len(concepts)
    digests = [_digest("split", concept) for concept in concepts]
    for group in sorted(groups, key=lambda group: min(digests[row] for row in group)):
        needed = Counter(categories[row] for row in group)
        side = next((s for s in room if all(room[s][c] >= n for c, n in needed.items())), "train")
        for row in group:
            sides[row] = side
        if side != "train":
            room[side].subtract(needed)
    return sides


def share_stems(concepts: Sequence[str], judged: Catalogue, found: Split, sides: Sequence[str]) -> list[bool]:
    """Whether each of some concepts shares a word stem with a judged one that ``sides`` hold out."""

    def keys(concept: str) -> list[str]:
        return group_keys(stems(concept, judged.language), found.ignored)

    held_out = (concept for concept, side in zip(judged.concepts, sides, strict=True) if side in ("val", "test"))
    taken = {key for concept in held_out for key in keys(concept)}
    return [not taken.isdisjoint(keys(concept)) for concept in concepts]


def split_by_category(catalogue: Catalogue) -> list[str]:
    """Hold out whole categories of the judged concepts, one in five each for validation and test, at least one.

    Returns:
        The side of each concept; "none" for one that shares a word stem with a held-out one of another category, and
        for one of a held-out category that is not judged.

    Raises:
        InputError: fewer than three categories.
    """
    judged = catalogue.judged
    names = sorted(set(judged.categories), key=lambda category: _digest("category", category))
    held = max(1, len(names) // 5)
    if len(names) < 3:
        raise InputError(f"--split categories: needs 3 categories at the least, found {len(names)}")
    side_of = dict.fromkeys(names[:held], "test") | dict.fromkeys(names[held : 2 * held], "val")
    found = [side_of.get(category, "train") for category in judged.categories]
    whole = compute_split(judged)
    for group in whole.groups:
        if len(own := {found[row] for row in group}) > 1:
            kept = "test" if "test" in own else "val"
            for row in group:
                found[row] = found[row] if found[row] == kept else "none"
    leaks = share_stems(catalogue.concepts[len(judged) :], judged, whole, found)
    others = zip(leaks, catalogue.categories[len(judged) :], strict=True)
    return found + ["none" if leak or category in side_of else "train" for leak, category in others]


def _quotas(sizes: Counter[str]) -> Counter[str]:
    """Held-out concepts by category, in proportion to its size (largest remainders)."""
    total = sizes.total()
    held_out = min(HELD_OUT, int(HELD_OUT_SHARE * total))
    exact = {category: held_out * size / total for category, size in sizes.items()}
    quotas = Counter({category: int(share) for category, share in exact.items()})
    by_remainder = sorted(exact, key=lambda category: (quotas[category] - exact[category], category))
    quotas.update(by_remainder[: held_out - quotas.total()])
    return quotas


def counts(sides: Iterable[str]) -> dict[str, int]:
    """Count the concepts of each side, in the order train, val, test."""
    found = Counter(sides)
    return {side: found[side] for side in SPLITS}
