"""Texts as the teacher's tokens, as they occur in its prompt, and the check of texts. NumPy and a tokenizer alone."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.errors import InputError

IntArray = NDArray[np.int64]

MAX_TEXT_LENGTH = 10_000  # characters
MAX_CACHED_WORDS = 200_000
WORDS_PER_TEXT = 512  # words that are encoded together
BLANK, LINE_BREAK = b" \n"


@dataclass(frozen=True)
class RaggedArray:
    """Integer lists of different lengths, end to end."""

    values: IntArray  # [total]
    offsets: IntArray  # [n + 1], where each list begins

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int] | IntArray]) -> RaggedArray:
        """Join lists."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        values = np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum()))
        return cls(values, np.concatenate([[0], lengths.cumsum()]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int) -> IntArray:
        return self.values[self.offsets[place] : self.offsets[place + 1]]

    @property
    def lengths(self) -> IntArray:
        """Length of each list, ``[n]``."""
        return np.diff(self.offsets)

    def take(self, places: IntArray) -> RaggedArray:
        """Select the lists at places ``[m]``, in their order."""
        starts = self.offsets[places]
        lengths = self.offsets[places + 1] - starts
        offsets = np.concatenate([[0], lengths.cumsum()])
        rows = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return RaggedArray(self.values[rows], offsets)

    def part(self, start: int, stop: int) -> RaggedArray:
        """The lists from ``start`` to before ``stop``."""
        first, last = self.offsets[[start, stop]]
        return RaggedArray(self.values[first:last], self.offsets[start : stop + 1] - first)

    def __add__(self, other: RaggedArray) -> RaggedArray:
        """Append the other's lists."""
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return RaggedArray(np.concatenate([self.values, other.values]), offsets)


class TokenCache:
    """The tokens of words, each encoded once; several threads may use it at once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._tokens = RaggedArray.from_lists([])
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TokenCache], tuple[()]]:
        return TokenCache, ()  # a copy, in another process too, begins empty: a lock cannot be pickled

    def tokens(self, words: Sequence[str], encode: Callable[[list[str]], RaggedArray]) -> RaggedArray:
        """Look up the token ids of each word; ``encode`` makes those of new words."""
        with self._lock:
            if len(self._numbers) > MAX_CACHED_WORDS:
                self._numbers, self._tokens = {}, RaggedArray.from_lists([])
            numbers = list(map(self._numbers.get, words))
            if None in numbers:
                new = list(set(words).difference(self._numbers))
                self._tokens += encode(new)
                self._numbers |= zip(new, range(len(self._numbers), len(self._tokens)), strict=True)
                numbers = list(map(self._numbers.get, words))
            known = self._tokens
        return known.take(np.array(numbers, np.int64))


@dataclass(frozen=True)
class Tokenization:
    """A function from texts to the teacher's tokens, as they occur in its prompt."""

    tokenizer: Tokenizer  # the teacher's
    prompt: str  # the template with {concept}, or as much of it as decides a text's tokens
    whole: bool  # whether all tokens of the prompt are the text's own, except a blank before it
    by_word: bool  # whether no token crosses a word's end, so that words can be cached
    rows: int  # tokens with a row in the student's tables; a tokenizer may have more
    _cache: TokenCache = field(default_factory=TokenCache, compare=False, repr=False)

    def __call__(self, texts: Sequence[str]) -> RaggedArray:
        """Encode texts that `normalise_texts` has checked.

        Returns:
            Token ids of each text.

        Raises:
            InputError: a text without any token, one that the tokenizer cannot read, or one with a token without a row.
            MemoryError: too many texts at once.
        """
        try:
            found = self._without_blank(self._encode_words_apart(texts) if self.by_word else self._encode(texts))
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers library raises no narrower class
            raise InputError(f"the teacher's tokenizer cannot read a text: {str(error)[:200]}") from error
        if not found.lengths.all():
            place = int(np.flatnonzero(found.lengths == 0)[0])
            raise InputError(f"text {texts[place][:60]!r}: the teacher's tokenizer gives it no token")
        if len(found.values) and found.values.max() >= self.rows:
            first = int(np.flatnonzero(found.values >= self.rows)[0])
            place = int(np.searchsorted(found.offsets, first, side="right")) - 1
            token = self.tokenizer.id_to_token(int(found.values[first]))
            raise InputError(f"text {texts[place][:60]!r}: the teacher has no embedding for the token {token!r} in it")
        return found

    @cached_property
    def _blank(self) -> int | None:
        """The token of a blank before a text that does not merge with the text's first token."""
        if not (self.whole and self.prompt.startswith(" ")):
            return None
        ids = self.tokenizer.encode(" ", add_special_tokens=False).ids
        return int(ids[0]) if len(ids) == 1 else None

    def _without_blank(self, found: RaggedArray) -> RaggedArray:
        """Remove the token of the blank before each text."""
        if self._blank is None or not len(found.values):
            return found
        starts = np.minimum(found.offsets[:-1], len(found.values) - 1)
        is_blank = (found.values[starts] == self._blank) & (found.lengths > 0)
        if not is_blank.any():
            return found
        lengths = found.lengths - is_blank
        return RaggedArray(np.delete(found.values, starts[is_blank]), np.concatenate([[0], lengths.cumsum()]))

    def _encode(self, texts: Sequence[str]) -> RaggedArray:
        prompts = [self.prompt.replace("{concept}", text) for text in texts]
        if self.whole:
            encoded = self.tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
            return RaggedArray.from_lists([one.ids for one in encoded])
        start = self.prompt.index("{concept}")
        own = []
        for one, text in zip(self.tokenizer.encode_batch(prompts), texts, strict=True):
            spans = zip(one.ids, one.offsets, strict=True)
            own.append([token for token, (left, right) in spans if left < start + len(text) and right > start])
        return RaggedArray.from_lists(own)

    def _encode_words_apart(self, texts: Sequence[str]) -> RaggedArray:
        """Encode texts; those of letters and single blanks are joined from the tokens of cached words."""
        lines = "\n".join(texts)
        if _are_words(lines.replace("\n", " ")) and lines.count("\n") == len(texts) - 1:
            return self._join_words(lines)
        is_plain = np.array([_are_words(text) for text in texts], bool)
        plain, other = (np.flatnonzero(chosen).tolist() for chosen in (is_plain, ~is_plain))
        found = self._encode([texts[place] for place in other])
        if len(plain):
            found += self._join_words("\n".join([texts[place] for place in plain]))
        return found.take(np.argsort(other + plain))

    def _join_words(self, lines: str) -> RaggedArray:
        """Tokens of each line of words with one blank between them."""
        found = self._cache.tokens(lines.replace("\n", " ").split(" "), self._encode_words)
        characters = np.frombuffer(lines.encode(), np.uint8)
        gaps = characters[(characters == BLANK) | (characters == LINE_BREAK)]
        ends = np.flatnonzero(gaps == LINE_BREAK) + 1  # words up to the end of each line but the last
        return RaggedArray(found.values, found.offsets[np.concatenate([[0], ends, [len(found)]])])

    def _encode_words(self, words: list[str]) -> RaggedArray:
        """Encode words, many in one text where the tokenizer can separate them: one call per word costs more."""
        if self.prompt != " {concept}":
            return self._encode(words)
        parts = [words[start : start + WORDS_PER_TEXT] for start in range(0, len(words), WORDS_PER_TEXT)]
        encoded = self.tokenizer.encode_batch([" " + " ".join(part) for part in parts], add_special_tokens=False)
        found = RaggedArray.from_lists([])
        for part, one in zip(parts, encoded, strict=True):
            word_ids = [-1 if number is None else number for number in one.word_ids]
            begins = np.flatnonzero(np.diff(word_ids, prepend=-1))
            if len(begins) == len(part):
                found += RaggedArray(np.array(one.ids, np.int64), np.append(begins, len(word_ids)))
            else:
                found += self._encode(part)
        return found


def _are_words(text: str) -> bool:
    """Whether a text is words of letters with one blank between them; a regular expression takes five times as long."""
    return text.replace(" ", "").isalpha() and "  " not in f" {text} "


def nfc(text: str) -> str:
    """The text in Unicode normalisation form C, in which texts are compared, looked up and hashed."""
    return unicodedata.normalize("NFC", text)


def casefolded(text: str) -> str:
    """The text in form C without letter case."""
    return nfc(text).casefold()


def normalise_texts(texts: Iterable[object], name: Callable[[int], str] = "text {}".format) -> list[str]:
    """Check texts, strip the blanks around them and bring them to form C; ``name`` gives a position its name in errors.

    Returns:
        The texts.

    Raises:
        InputError: a value that is no text, or a text that is empty, too long, or has a null byte.
    """
    texts = list(texts)
    try:  # all at once, which takes less time
        stripped = list(map(str.strip, texts))  # type: ignore[arg-type]
        joined = "\n".join(stripped)
        joined.encode()
        if "\0" not in joined and all(stripped) and max(map(len, stripped), default=0) <= MAX_TEXT_LENGTH:
            return stripped if unicodedata.is_normalized("NFC", joined) else list(map(nfc, stripped))
    except (TypeError, UnicodeEncodeError):
        pass
    return [_normalise_text(text, name(place)) for place, text in enumerate(texts)]  # finds the wrong one


def _normalise_text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name}: expected text, found {type(text).__name__}")
    text = text.strip()
    if not text:
        raise InputError(f"{name}: empty")
    if len(text) > MAX_TEXT_LENGTH:
        raise InputError(f"{name}: {len(text):,} characters; expected {MAX_TEXT_LENGTH:,} at the most")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry
        raise InputError(f"{name}: half a character in it") from None
    if "\0" in text:
        raise InputError(f"{name}: a null byte in it")
    return nfc(text)
