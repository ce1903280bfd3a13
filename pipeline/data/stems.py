"""Word stems of concepts, and the groups of concepts that share one, in any language with a Snowball stemmer."""

from __future__ import annotations

import functools
import importlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Sequence

import snowballstemmer

from pipeline.student.tokenizer import casefolded

# Words that two phrases may share without sharing a meaning: "point of view" and "sense of humour".
FUNCTION_WORD_FREQUENCY = 6.3  # Zipf frequency: more than two of a thousand words of a language's texts
RARER_FUNCTION_WORDS = frozenset({"off", "s"})  # of English
FREQUENT_WORDS = 200  # of a language, which include its function words

SENSE = re.compile(r"\.[nvasr]\.\d+$")  # of WordNet's names of senses: dog.n.01
JOINERS = "\u200c\u200d"  # within words of Persian and of Indian scripts
HAN = re.compile("[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{2,}")

STEMMERS = {
    "da": "danish", "de": "german", "en": "english", "es": "spanish", "fi": "finnish", "fr": "french",
    "hu": "hungarian", "it": "italian", "nb": "norwegian", "nl": "dutch", "pt": "portuguese", "ro": "romanian",
    "ru": "russian", "sv": "swedish", "tr": "turkish",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Find the words of a text, without letter case.

    A word is a run of letters and digits with the marks that combine with them. Chinese and Japanese put no blanks
    between words: two neighbouring Han characters count as one.

    Args:
        text: any text.

    Returns:
        The words in order; a run of Han characters within another word comes after it.
    """
    text = SENSE.sub("", casefolded(text))
    if text.isascii():
        return re.findall(r"[^\W_]+", text)
    found, word = [], ""
    for character in f"{text} ":
        if character.isalnum() or (word and (unicodedata.category(character)[0] == "M" or character in JOINERS)):
            word += character
        elif word:
            pairs = [run[at : at + 2] for run in HAN.findall(word) for at in range(len(run) - 1)]
            found += pairs if HAN.fullmatch(word) else [word, *pairs]
            word = ""
    return found


@functools.cache
def _function_words(language: str) -> frozenset[str]:
    wordfreq = importlib.import_module("wordfreq")  # only here: it takes a third of a second to load
    frequent = wordfreq.top_n_list(language, FREQUENT_WORDS, wordlist="small")
    chosen = {word for word in frequent if wordfreq.zipf_frequency(word, language, "small") >= FUNCTION_WORD_FREQUENCY}
    return RARER_FUNCTION_WORDS.union(*map(words, chosen))


@functools.lru_cache(1 << 20)
def stem(word: str, language: str) -> str:
    """The stem of a word (Snowball stemmer, Porter 2001)."""
    return str(snowballstemmer.stemmer(STEMMERS[language]).stemWord(word))


def stems(concept: str, language: str = "en") -> set[str]:
    """The stems of a concept's words, without function words."""
    found = words(concept)
    if len(found) > 1:
        found = [word for word in found if word not in _function_words(language)] or found
    return {stem(word, language) for word in found} or {casefolded(concept)}


def stem_groups(concepts: Sequence[str], language: str = "en") -> list[list[int]]:
    """Group the rows of concepts that share a word stem, directly or through others."""
    return connected_rows([stems(concept, language) for concept in concepts])


def group_keys(own: Collection[str], ignored: Collection[str] = ()) -> list[str]:
    """What a concept shares with the others of its group: its stems but ignored ones, or all of them in one key."""
    return [stem for stem in own if stem not in ignored] or [" ".join(sorted(own))]


def connected_rows(stems_by_row: Sequence[Collection[str]], ignored: Collection[str] = ()) -> list[list[int]]:
    """Group rows by shared stems (union-find); rows with only ignored stems group with their equals."""
    parent = list(range(len(stems_by_row)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_with: dict[str, int] = {}
    for row, own in enumerate(stems_by_row):
        for key in group_keys(own, ignored):
            parent[root(row)] = root(first_with.setdefault(key, row))
    groups: dict[int, list[int]] = defaultdict(list)
    for row in range(len(stems_by_row)):
        groups[root(row)].append(row)
    return list(groups.values())
