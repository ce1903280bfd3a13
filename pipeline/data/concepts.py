"""The catalogue of concepts, the order in which subsets are taken from it, and its split.

A catalogue is a CSV file with the columns ``concept`` and ``category``, or ``wordfreq:<language>:<n>``, the n most
frequent words of a language.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import snowballstemmer

from pipeline.data import lists
from pipeline.errors import InputError, choices
from pipeline.storage import fetch
from pipeline.student.tokenizer import casefolded, nfc, normalise_texts

SPLITS = ("train", "val", "test")
HELD_OUT = 200  # concepts in each of validation and test, where the catalogue is large enough
HELD_OUT_SHARE = 0.1  # the most that each may take of a smaller catalogue

ENOUGH = 0.5  # of the concepts that each of validation and test should have: with fewer, common words count no more
FAMILY = 4  # concepts that share a word stay together however common it is; no word of the shipped catalogue has more

# Words that two phrases may share without sharing a meaning: "point of view" tells nothing about "sense of humour".
FUNCTION_WORDS = 6.3  # Zipf frequency of a language's function words: more than two of a thousand words of its texts
RARER_FUNCTION_WORDS = frozenset({"off", "s"})  # of English
FREQUENT = 200  # words of a language among which these are

SENSE = re.compile(r"\.[nvasr]\.\d+$")  # of WordNet's names of senses: dog.n.01
JOINERS = "\u200c\u200d"  # within words of Persian and of Indian scripts
HAN = re.compile("[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{2,}")

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
        concepts: the words or phrases, unique in any letter case and Unicode form.
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
        InputError: the source is missing, empty, not text, lacks a column or a value, or names a concept twice; or a
            language without a stemmer, or another one than the source names.
    """
    if language is not None and language not in STEMMERS:
        raise choices("language", language, STEMMERS)
    if not source.startswith("wordfreq:"):
        return replace(_read_table(source), language=language or "en")
    found = _read_wordfreq(source)
    if language not in (None, found.language):
        raise InputError(f"--language {language}: --concepts {source} are words of {found.language!r}")
    return found


def _read_table(source: str) -> Catalogue:
    name = f"concepts file {source}"
    with lists.opened(fetch(source), name) as file:
        rows = list(lists.table(file, name, ("concept", "category")))
    # A line break within a value is how a spreadsheet shows a long phrase.
    concepts = normalise_texts(
        (_on_one_line(concept) for _, (concept, _) in rows), lambda place: f"{name}, line {rows[place][0]}"
    )
    seen: dict[str, int] = {}
    for concept, (line, _) in zip(concepts, rows, strict=True):
        if (before := seen.setdefault(" ".join(casefolded(concept).split()), line)) != line:
            raise InputError(
                f"{name}, line {line}: {concept!r} stands already at line {before}; name each concept once"
            )
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
    return hashlib.sha256(f"{purpose}\n{casefolded(text)}".encode()).digest()


def words(text: str) -> list[str]:
    """The words of a text in one letter case and Unicode form.

    A word is a run of letters and digits with the marks that combine with them. Chinese and Japanese put no blanks
    between words: two neighbouring Han characters count as one.
    """
    text = SENSE.sub("", casefolded(text))
    if text.isascii():
        return re.findall(r"[^\W_]+", text)
    found, word = [], ""
    for sign in f"{text} ":
        if sign.isalnum() or (word and (unicodedata.category(sign)[0] == "M" or sign in JOINERS)):
            word += sign
        elif word:
            pairs = [run[at : at + 2] for run in HAN.findall(word) for at in range(len(run) - 1)]
            found += pairs if HAN.fullmatch(word) else [word, *pairs]
            word = ""
    return found


@functools.cache
def _function_words(language: str) -> frozenset[str]:
    wordfreq = importlib.import_module("wordfreq")  # only here: it takes a third of a second to load
    frequent = wordfreq.top_n_list(language, FREQUENT, wordlist="small")
    chosen = {word for word in frequent if wordfreq.zipf_frequency(word, language, "small") >= FUNCTION_WORDS}
    return RARER_FUNCTION_WORDS.union(*map(words, chosen))


@functools.lru_cache(1 << 17)
def _stem(word: str, language: str) -> str:
    return str(snowballstemmer.stemmer(STEMMERS[language]).stemWord(word))


def stems(concept: str, language: str = "en") -> set[str]:
    """The stems of a concept's words, without function words (Snowball stemmer, Porter 2001)."""
    found = words(concept)
    if len(found) > 1:
        found = [word for word in found if word not in _function_words(language)] or found
    return {_stem(word, language) for word in found} or {casefolded(concept)}


def stem_groups(concepts: Sequence[str], language: str = "en") -> list[list[int]]:
    """Row numbers grouped so that concepts which share a word stem, directly or through others, are together."""
    return _joined([stems(concept, language) for concept in concepts])


def _joined(stems_of: Sequence[Collection[str]], common: Collection[str] = ()) -> list[list[int]]:
    """Row numbers grouped by shared stems, of which common ones do not count; rows of only these group with equals."""
    parent = list(range(len(stems_of)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_with: dict[str, int] = {}
    for row, own in enumerate(stems_of):
        for stem in [stem for stem in own if stem not in common] or [" ".join(sorted(own))]:
            parent[root(row)] = root(first_with.setdefault(stem, row))
    groups: dict[int, list[int]] = defaultdict(list)
    for row in range(len(stems_of)):
        groups[root(row)].append(row)
    return list(groups.values())


@dataclass(frozen=True)
class Split:
    """The split of a catalogue, and what limits it.

    Attributes:
        sides: of each concept: "train", "val" or "test".
        groups: row numbers of the concepts that stay on one side.
        common: words that keep nothing together, those of most concepts first.
        asked: how many concepts each of validation and test should have.
        with_common: how many the smaller of the two could have if the common words counted.
    """

    sides: list[str]
    groups: list[list[int]]
    common: list[str]
    asked: int
    with_common: int

    @property
    def warnings(self) -> list[str]:
        """A line for each thing that the user of the split should know."""
        held_out, told = counts(self.sides), []
        if self.common:
            shown = ", ".join([*self.common[:5], *["..."][: len(self.common) - 5]])
            told.append(
                f"common words ({len(self.common):,}: {shown}) do not keep the concepts that share them on one side of "
                f"the split; else {self.with_common} of {self.asked} could be held out for validation or for test"
            )
        if min(held_out["val"], held_out["test"]) < self.asked:
            told.append(
                f"{held_out['val']} of {self.asked} concepts are held out for validation and {held_out['test']} of "
                f"{self.asked} for test: concepts that share a word, directly or through others, stay on one side, and "
                f"the largest such group has {max(map(len, self.groups)):,} of {len(self.sides):,}"
            )
        return told


def split(catalogue: Catalogue) -> list[str]:
    """The split of each concept: "train", "val" or "test".

    About `HELD_OUT` concepts each go to validation and to test, every category in proportion; concepts that share a
    word stem go to the same side. The result depends on the set of concepts only: groups are visited in the order of
    a hash and each takes the first side that has room in all of its categories, so a family of many phrases trains.
    """
    return compute_split(catalogue).sides


def compute_split(catalogue: Catalogue) -> Split:
    """The `split` with what limits it.

    Descriptions ("terms related to ...") share words that join them all to one group, which nothing can be held out
    of. So where less than `ENOUGH` could be held out, the words that most concepts share do not count, as few of them
    as it takes; the words of at most `FAMILY` concepts always do.
    """
    concepts, categories = catalogue.concepts, catalogue.categories
    stems_of = [stems(concept, catalogue.language) for concept in concepts]
    shared = Counter(stem for own in stems_of for stem in own)
    asked = _quotas(Counter(categories)).total()

    def common_above(most: int) -> set[str]:
        return {stem for stem, number in shared.items() if number > most}

    def deal(most: int) -> tuple[list[str], list[list[int]]]:
        groups = _joined(stems_of, common_above(most))
        return _deal(groups, concepts, categories), groups

    def fewest(most: int) -> int:
        found = counts(deal(most)[0])
        return min(found["val"], found["test"])

    most = max(shared.values(), default=0)
    if (with_common := fewest(most)) < ENOUGH * asked:
        levels = sorted({FAMILY, *(number for number in shared.values() if number > FAMILY)})
        enough = levels[max(0, bisect_left(levels, True, key=lambda most: fewest(most) < ENOUGH * asked) - 1)]
        most = enough if fewest(enough) > with_common else most
    sides, groups = deal(most)
    common = sorted(common_above(most), key=lambda stem: (-shared[stem], stem))
    word_of = {_stem(word, catalogue.language): word for concept in concepts for word in words(concept)}
    return Split(sides, groups, [word_of.get(stem, stem) for stem in common], asked, with_common)


def _deal(groups: Sequence[list[int]], concepts: Sequence[str], categories: Sequence[str]) -> list[str]:
    """The side of each concept, those of a group together."""
    sizes = Counter(categories)
    room = {side: _quotas(sizes) for side in ("test", "val")}
    sides = ["train"] * len(concepts)
    place = [_digest("split", concept) for concept in concepts]
    for group in sorted(groups, key=lambda group: min(place[row] for row in group)):
        wanted = Counter(categories[row] for row in group)
        side = next((s for s in room if all(room[s][c] >= n for c, n in wanted.items())), "train")
        for row in group:
            sides[row] = side
        if side != "train":
            room[side].subtract(wanted)
    return sides


def split_by_category(concepts: Sequence[str], categories: Sequence[str], language: str = "en") -> list[str]:
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
    for group in compute_split(Catalogue(tuple(concepts), tuple(categories), language)).groups:
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
