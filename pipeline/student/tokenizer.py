"""How texts become the teacher's tokens, as they stand in its prompt; which texts may.

NumPy and a tokenizer alone: a trained student reads without torch.
"""

from __future__ import annotations

import re
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

LONGEST_TEXT = 10_000  # characters
KNOWN_WORDS = 200_000  # whose tokens are remembered
WORDS_OF_A_TEXT = 512
BLANK, LINE_BREAK = b" \n"
LETTERS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")


@dataclass(frozen=True)
class RaggedArray:
    """Lists of whole numbers of different lengths, end to end.

    Attributes:
        values: ``[total]``.
        offsets: ``[n + 1]``, where each list begins.
    """

    values: IntArray
    offsets: IntArray

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | IntArray]) -> RaggedArray:
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
        """Of each list, ``[n]``."""
        return np.diff(self.offsets)

    def take(self, places: IntArray) -> RaggedArray:
        """Some of the lists, in the order of their places ``[m]``."""
        lengths = self.lengths[places]
        offsets = np.concatenate([[0], lengths.cumsum()])
        rows = np.repeat(self.offsets[:-1][places] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return RaggedArray(self.values[rows], offsets)

    def part(self, start: int, stop: int) -> RaggedArray:
        """The lists from one to before another."""
        first, last = self.offsets[[start, stop]]
        return RaggedArray(self.values[first:last], self.offsets[start : stop + 1] - first)

    def __add__(self, other: RaggedArray) -> RaggedArray:
        """These lists and then the others."""
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return RaggedArray(np.concatenate([self.values, other.values]), offsets)


class Numbers(dict[str, int]):
    """Numbers of words in the order in which they were first met; the new ones stand in ``new``."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self.new.append(word)
        self[word] = number = len(self)
        return number


class Words:
    """The tokens of words, each encoded once. Many threads may ask."""

    def __init__(self) -> None:
        self._numbers = Numbers()
        self._tokens = RaggedArray.of([])
        self._asked = threading.Lock()

    def __len__(self) -> int:
        return len(self._numbers)

    def __reduce__(self) -> tuple[type[Words], tuple[()]]:
        return Words, ()  # a copy, in another process too, meets its words itself

    def tokens(self, words: Sequence[str], encode: Callable[[list[str]], RaggedArray]) -> RaggedArray:
        """Token ids of each word; ``encode`` is asked for those that were not met before."""
        with self._asked:
            numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
            new, self._numbers.new = self._numbers.new, []
            if new:
                try:
                    self._tokens += encode(new)
                except BaseException:
                    for word in new:
                        del self._numbers[word]
                    raise
            known = self._tokens
        return known.take(numbers)


@dataclass(frozen=True)
class Tokenization:
    """Texts as the teacher's tokens, as they stand in its prompt.

    Attributes:
        tokenizer: the teacher's.
        prompt: what stands around ``{concept}``: the template, or as much of it as tells how a text's tokens fall.
        whole: whether all tokens of the prompt are the text's own, but for a blank before it.
        by_word: whether the words of a text are tokens of their own each, so that words can be remembered.
        rows: how many tokens have a row in the teacher's tables; a tokenizer may have more.
    """

    tokenizer: Tokenizer
    prompt: str
    whole: bool
    by_word: bool
    rows: int
    _met: list[Words] = field(default_factory=lambda: [Words()], compare=False, repr=False)

    def __call__(self, texts: Sequence[str]) -> RaggedArray:
        """Token ids of each text.

        Raises:
            InputError: a text without any token, one that the tokenizer cannot read, or one with a token without a row.
        """
        try:
            found = self._without_blank(self._by_word(texts) if self.by_word else self._encode(texts))
        except MemoryError:
            raise
        except Exception as error:  # as the tokenizers library raises
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
        """The token of a blank before a text that does not become one with the text's first token."""
        if not (self.whole and self.prompt.startswith(" ")):
            return None
        ids = self.tokenizer.encode(" ", add_special_tokens=False).ids
        return int(ids[0]) if len(ids) == 1 else None

    def _without_blank(self, found: RaggedArray) -> RaggedArray:
        """The tokens of texts without that of the blank before them."""
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
            return RaggedArray.of(
                [one.ids for one in self.tokenizer.encode_batch_fast(prompts, add_special_tokens=False)]
            )
        start = self.prompt.index("{concept}")
        return RaggedArray.of(
            [
                [
                    number
                    for number, (left, right) in zip(one.ids, one.offsets, strict=True)
                    if left < start + len(text) and right > start
                ]
                for one, text in zip(self.tokenizer.encode_batch(prompts), texts, strict=True)
            ]
        )

    def _by_word(self, texts: Sequence[str]) -> RaggedArray:
        """Tokens of texts, of which words and blanks alone are put together from words met before."""
        lines = "\n".join(texts)
        if _is_of_words(lines) and lines.count("\n") == len(texts) - 1:
            return self._of_words(lines)
        of_letters = np.fromiter((LETTERS.fullmatch(text) is not None for text in texts), bool, len(texts))
        plain, other = (np.flatnonzero(kind).tolist() for kind in (of_letters, ~of_letters))
        found = self._encode([texts[place] for place in other])
        if len(plain):
            found += self._of_words("\n".join([texts[place] for place in plain]))
        return found.take(np.argsort(other + plain))

    def _of_words(self, lines: str) -> RaggedArray:
        """Tokens of each line of words with one blank between them."""
        if len(self._met[0]) > KNOWN_WORDS:
            self._met[0] = Words()  # others go on with the one they have
        found = self._met[0].tokens(lines.replace("\n", " ").split(" "), self._encode_words)
        signs = np.frombuffer(lines.encode(), np.uint8)
        breaks = np.flatnonzero(signs[(signs == BLANK) | (signs == LINE_BREAK)] == LINE_BREAK)  # words before, less 1
        return RaggedArray(found.values, found.offsets[np.concatenate([[0], breaks + 1, [len(found)]])])

    def _encode_words(self, words: list[str]) -> RaggedArray:
        """Tokens of words, many in one text where the tokenizer tells them apart: an encoding each costs more."""
        if self.prompt != " {concept}":
            return self._encode(words)
        parts = [words[start : start + WORDS_OF_A_TEXT] for start in range(0, len(words), WORDS_OF_A_TEXT)]
        encoded = self.tokenizer.encode_batch([" " + " ".join(part) for part in parts], add_special_tokens=False)
        found = RaggedArray.of([])
        for part, one in zip(parts, encoded, strict=True):
            words_of = [-1 if number is None else number for number in one.word_ids]
            begins = np.flatnonzero(np.diff(words_of, prepend=-1))
            if len(begins) == len(part):
                found += RaggedArray(np.array(one.ids, np.int64), np.append(begins, len(words_of)))
            else:
                found += self._encode(part)
        return found


def _is_of_words(lines: str) -> bool:
    """Whether lines are words of letters with one blank between them; a pattern would take five times as long."""
    gaps = ("  ", " \n", "\n ", "\n\n")
    return (
        lines.replace(" ", "").replace("\n", "").isalpha()
        and lines[0] not in " \n"
        and lines[-1] not in " \n"
        and not any(gap in lines for gap in gaps)
    )


def nfc(text: str) -> str:
    """The text in Unicode's normal form C, in which texts are compared, looked up and hashed."""
    return unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """What texts have in common that differ in letter case and Unicode form only."""
    return nfc(text).casefold()


def normalise_texts(texts: Iterable[object], name: Callable[[int], str] = "text {}".format) -> list[str]:
    """Texts in normal form C without the blanks around them.

    Args:
        texts: whatever came.
        name: how an error calls the text at a place, from 0.

    Raises:
        InputError: something that is no text, an empty one, one with a null byte, or one too long.
    """
    texts = list(texts)
    try:
        bare = list(map(str.strip, texts))  # type: ignore[arg-type]
        whole = "\n".join(bare)
        whole.encode()
        if "\0" not in whole and all(bare) and max(map(len, bare), default=0) <= LONGEST_TEXT:
            return bare if unicodedata.is_normalized("NFC", whole) else list(map(nfc, bare))
    except (TypeError, UnicodeEncodeError):
        pass
    return [_checked(text, name(place)) for place, text in enumerate(texts)]  # which it is, and what is wrong with it


def _checked(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name}: expected text, found {type(text).__name__}")
    bare = text.strip()
    if not bare:
        raise InputError(f"{name}: empty")
    if len(bare) > LONGEST_TEXT:
        raise InputError(f"{name}: {len(bare):,} characters; expected {LONGEST_TEXT:,} at the most")
    try:
        bare.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry
        raise InputError(f"{name}: half a character in it") from None
    if "\0" in bare:
        raise InputError(f"{name}: a null byte in it")
    return nfc(bare)
