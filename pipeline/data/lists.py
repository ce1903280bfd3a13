"""Reading of users' lists: text files, the CSV of spreadsheets, and standard input.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; any other encoding is refused, as a wrong guess would turn
letters into others. Lines end with LF, CRLF or CR. Errors name file and line. Memory does not grow with a list.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import InputError
from pipeline.student.tokenizer import casefolded

TABLES = (".csv", ".tsv")
SEPARATORS = (",", ";", "\t")  # as spreadsheets write them, by country and format
BLANK = '",;\t\r\n '  # the characters of a row without values
BYTE_ORDER_MARK = "\ufeff"
ENCODINGS = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")  # UTF-32 first: its mark begins with that of UTF-16
OTHER_KINDS = {
    b"PK\x03\x04": "a spreadsheet's own format or a zip archive",
    b"\xd0\xcf\x11\xe0": "a spreadsheet's own format",
    b"\x1f\x8b": "compressed with gzip",
}
BLOCK = 1 << 20  # bytes read at once
LONGEST = 1 << 24  # characters of a line, and of a value of a table
LONGEST_HEADER = 1 << 16  # characters of the names of columns
SHOWN = 80  # characters that an error quotes

NumberedLines = Iterator[tuple[int, str]]


def is_table(place: str) -> bool:
    """Whether a file is a table by its name."""
    return Path(place).suffix.lower() in TABLES


def opened(path: Path, name: str) -> BinaryIO:
    """Open a file for reading; raises `InputError` with its name where that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error


def standard_input() -> BinaryIO:
    """Standard input as bytes, in any locale; raises `InputError` where it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed")
    return sys.stdin.buffer


def lines(file: BinaryIO, name: str) -> NumberedLines:
    """Read lines with their numbers, from 1; errors begin with the name.

    Yields:
        The number and the line with its line end, without byte order marks.

    Raises:
        InputError: not text in one of the encodings, a null byte, a line too long, or a file that cannot be read.
    """
    block = read_block(file, name)
    for beginning, kind in OTHER_KINDS.items():
        if block.startswith(beginning):
            raise InputError(f"{name}: {kind}; expected text: save it as CSV or plain text, in UTF-8")
    encoding = next((known for known in ENCODINGS if block.startswith(BYTE_ORDER_MARK.encode(known))), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    number, rest = 0, ""
    while True:
        following = read_block(file, name)
        try:
            rest += decoder.decode(block, final=not following)
        except UnicodeDecodeError as error:
            before = rest + error.object[: error.start].decode(encoding)
            number += 1 + sum(part.endswith(("\n", "\r")) for part in _split_lines(before))
            raise InputError(f"{name}, line {number}: {_decoding_error(error)}") from error
        parts = _split_lines(rest)
        rest = parts.pop() if parts and following else ""  # the end of a line may be cut in two
        for line in parts:
            number += 1
            if "\0" in line:
                hint = "; UTF-16 without a byte order mark? save it as UTF-8" if number == 1 else ""
                raise InputError(f"{name}, line {number}: a null byte{hint}")
            yield number, line.lstrip(BYTE_ORDER_MARK)  # files put end to end leave marks amid the text
        if len(rest) > LONGEST:
            raise InputError(f"{name}, line {number + 1}: over {LONGEST:,} characters in one line")
        if not following:
            break
        block = following


def read_block(file: BinaryIO, name: str) -> bytes:
    """The next bytes of a file, none at its end; raises `InputError` where it cannot be read."""
    try:
        return file.read(BLOCK)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error


def _split_lines(text: str) -> list[str]:
    """Split lines, with their ends; `str.splitlines` splits at ten more characters."""
    return list(io.StringIO(text, newline=""))


def _decoding_error(error: UnicodeDecodeError) -> str:
    if error.encoding != "utf-8":
        return f"not UTF-8 text, and no {error.encoding[:6].upper()} text as its byte order mark says ({error.reason})"
    byte = error.object[error.start : error.start + 1]
    letter = byte.decode("cp1252", "replace")
    hint = f", {letter!r} in Windows-1252" if letter.isalpha() else ""
    return f"not UTF-8 text (byte 0x{byte.hex()}{hint}); save it as UTF-8, which spreadsheets call CSV UTF-8"


def whole(path: Path, name: str) -> str:
    """All text of a small file; raises what `opened` and `lines` raise."""
    with opened(path, name) as file:
        return "".join(line for _, line in lines(file, name))


def texts(file: BinaryIO, name: str) -> NumberedLines:
    """Read one text per line, with its line's number, without blank lines; raises what `lines` raises."""
    for number, line in lines(file, name):
        if text := line.strip():
            yield number, text


def table(file: BinaryIO, name: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Read some columns of a table with a header line.

    The separator is a comma or, where only that finds the columns in the header, a semicolon or a tab. Columns are
    found in any letter case. Rows without any value are left out.

    Yields:
        For each row the line on which it begins, and its stripped values in the order of the columns.

    Raises:
        InputError: what `lines` raises, a header without the columns, a quote that is not closed, a row that lacks one
            of the values or has more of them than the header.
    """
    csv.field_size_limit(LONGEST)
    numbered = lines(file, name)
    start, first = next(((number, line) for number, line in numbered if line.strip(BLANK)), (1, ""))
    rest = (line for _, line in numbered)
    while first.count('"') % 2 and len(first) < LONGEST_HEADER and (line := next(rest, "")):  # a name on several lines
        first += line
    separator = next((one for one in SEPARATORS if _fits(columns, first, one)), SEPARATORS[0])
    all_lines = itertools.chain(_split_lines(first) or [""], rest)
    rows = csv.reader(all_lines, delimiter=separator, strict=True, skipinitialspace=True)
    header: list[str] = []
    places: list[int] = []
    while True:
        number = start + rows.line_num  # of the row's first line
        where = f"{name}, line {number}"
        try:
            row = [value.strip() for value in next(rows)]
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{where}: {_csv_error(error)}") from error
        if not places:
            header, places = row, _find_columns(columns, row, where)
        elif any(row):
            values = [row[place] if place < len(row) else "" for place in places]
            if not all(values) or any(row[len(header) :]):
                raise InputError(f"{where}: expected values for {_quoted(header)}, found {_quoted(row)}")
            yield number, values


def is_header(line: str, columns: Sequence[str]) -> bool:
    """Whether a line is the header of a table with these columns."""
    return any(_fits(columns, line, separator) for separator in SEPARATORS)


def _fits(columns: Sequence[str], first: str, separator: str) -> bool:
    """Whether a separator finds the columns in the header."""
    try:
        header = next(csv.reader(_split_lines(first), delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return False
    return {canonical(name) for name in columns} <= {canonical(name) for name in header}


def canonical(name: str) -> str:
    """A name without letter case and with single blanks, as names are compared."""
    return " ".join(casefolded(name).split())


def _find_columns(columns: Sequence[str], header: Sequence[str], where: str) -> list[int]:
    """Find each column in the header, by its exact name or else in another letter case."""
    found = []
    for column in columns:
        exact = [place for place, name in enumerate(header) if name == column]
        alike = exact or [place for place, name in enumerate(header) if canonical(name) == canonical(column)]
        if len(alike) != 1:
            problem = f"several columns {column!r}" if alike else f"no column {column!r}"
            names = ", ".join(" ".join(name.split()) for name in header if name)[:SHOWN] or "none"
            raise InputError(f"{where}: expected a header line {_quoted(columns)}: {problem}; it has {names}")
        found += alike
    return found


def _quoted(values: Sequence[str]) -> str:
    return repr(",".join(values)[:SHOWN])


def _csv_error(error: csv.Error) -> str:
    if "field larger" in str(error):
        return f"a value of over {LONGEST:,} characters; is a quote not closed?"
    return "a quote that is not closed, or text behind a closing quote (within quotes, a quote is written twice)"
