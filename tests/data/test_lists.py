"""Lists come out as their owner means them, from any spreadsheet, or one line says what is wrong with them."""

import codecs
import csv
import io
import random
import re
import unicodedata

import pytest

from pipeline.data import lists
from pipeline.errors import InputError
from pipeline.sweep.grid import read_grid

ROWS = [
    ["ice cream", "Food"],
    ["café crème", "Food"],
    ['a "quoted", phrase', "Arts"],
    ["two\nlines", "Art; x"],
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"]  # each but the first with its byte order mark
WANTED = ("concept", "category")


def encoded(text, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    return mark + text.encode(encoding)


def as_csv(rows, separator=",", end="\r\n", quoting=csv.QUOTE_MINIMAL):
    made = io.StringIO(newline="")
    csv.writer(made, delimiter=separator, quoting=quoting).writerows(rows)
    return made.getvalue().replace("\r\n", end)


def table(content, columns=WANTED):
    return list(lists.table(io.BytesIO(content), "list.csv", columns))


def texts(content):
    return list(lists.texts(io.BytesIO(content), "list.txt"))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheets_table_is_read_in_every_form(encoding, end, separator, monkeypatch):
    monkeypatch.setattr(lists, "BLOCK", 5)  # every character and line end is cut somewhere
    for header in (["concept", "category"], [" Concept", "CATEGORY "], ["category", "n", "Concept"]):
        places = [next(place for place, name in enumerate(header) if name.strip().casefold() == one) for one in WANTED]
        body = [["1"] * len(header) for _ in ROWS]
        for row, values in zip(body, ROWS, strict=True):
            for place, value in zip(places, values, strict=True):
                row[place] = value
        blank = [[], [""] * len(header)]
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
            text = as_csv([*blank, header, *body[:2], *blank, *body[2:], *blank], separator, end, quoting)
            found = table(encoded(text, encoding))
            assert [values for _, values in found] == ROWS
            assert [line for line, _ in found] == [4, 5, 8, 9]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lines_are_texts(encoding, monkeypatch):
    monkeypatch.setattr(lists, "BLOCK", 4)
    content = encoded("one\n\n  two words \r\nthree\rfour\u2028parts\n\ufefffive", encoding)
    assert texts(content) == [(1, "one"), (3, "two words"), (4, "three"), (5, "four\u2028parts"), (6, "five")]
    assert texts(encoded("", encoding)) == []


def test_the_cells_of_a_spreadsheet_that_go_beyond_its_columns_are_blank_or_wrong():
    assert table(b"concept,category,,\nice,Food,,\nfire,Nature,,,\n") == [(2, ["ice", "Food"]), (3, ["fire", "Nature"])]
    with pytest.raises(InputError, match=r"list\.csv, line 2: expected values for 'concept,category', found 'ice,a,b'"):
        table(b"concept,category\nice,a,b\n")


def test_a_column_is_that_of_its_very_name_before_that_of_another_case():
    content = "Term,term,cafe\u0301\n1,2,3\n".encode()
    assert table(content, ["term"]) == [(2, ["2"])]
    assert table(content, ["TERM", "CAFÉ"][1:]) == [(2, ["3"])]
    with pytest.raises(InputError, match="several columns 'TERM'; it has Term, term"):
        table(content, ["TERM"])


def test_a_header_may_have_names_on_several_lines():
    assert table(b'"Nu\nmber";"\nConcept ";category\r\n1;ice;Food\r\n') == [(4, ["ice", "Food"])]
    with pytest.raises(InputError, match="line 1: a quote that is not closed"):
        table(b'"concept,category\n' + b"ice,Food\n" * 3)


def test_a_value_as_long_as_a_book_is_read(monkeypatch):
    long = "word " * 100_000
    assert table(f'concept,category\n"{long}",a\n'.encode()) == [(2, [long.strip(), "a"])]
    monkeypatch.setattr(lists, "LONGEST", 1000)
    with pytest.raises(InputError, match=r"line 3: a value of over 1,000 characters; is a quote not closed\?"):
        table(b'concept,category\nice,Food\n"fire,Nature\n' + b"wind,Nature\n" * 1000)
    monkeypatch.setattr(lists, "BLOCK", 100)
    with pytest.raises(InputError, match="line 2: over 1,000 characters in one line"):
        texts(b"one\n" + b"x" * 2000)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "line 1: expected a header line 'concept,category': no column 'concept'; it has none"),
        (b"volcano\nriver\n", "line 1: expected a header line 'concept,category': no column 'concept'; it has volcano"),
        (b"concept;category,kind\nice;Food,x\n", "line 1: expected a header line"),
        (b'concept,category\nice,Food\n"fire,Nature\nwind,Nature\n', "line 3: a quote that is not closed"),
        (b'concept,category\n"fire,Nature\n"wind",Nature\n', "line 2: a quote that is not closed"),
        (
            b'concept,category\n\n"two\nlines",Food\n"ice" cream,Food\n',
            "line 5: a quote that is not closed, or text",
        ),
        (b"concept,category\nice,\n", "line 2: expected values for 'concept,category', found 'ice,'"),
        (b"concept,category\nice\0,Food\n", "line 2: a null byte"),
        ("concept,category\n".encode("utf-16-le"), "line 1: a null byte; UTF-16 without a byte order mark?"),
        (
            "concept,category\nice,Food\ncafé,Food\n".encode("cp1252"),
            "line 3: not UTF-8 text (byte 0xe9, 'é' in Wi",
        ),
        (b"concept,category\r\rcaf\x81,Food\r", "line 3: not UTF-8 text (byte 0x81); save it as UTF-8"),
        ("concept,category\nice,Food\n".encode("utf-16")[:-1], "and no UTF-16 text as its byte order mark says (trunc"),
        (b"PK\x03\x04\x14\x00", "a spreadsheet's own format or a zip archive; expected text"),
    ],
)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_what_is_wrong_is_named_with_its_line(content, complaint, block, monkeypatch):
    monkeypatch.setattr(lists, "BLOCK", block)
    with pytest.raises(InputError) as caught:
        table(content)
    assert str(caught.value).startswith("list.csv")
    assert complaint in str(caught.value)


def test_a_grid_is_read_in_any_encoding(tmp_path):
    text = "fixed: {epochs: 3}\naxes:\n  concepts: [20, 40]\n"
    for encoding in ENCODINGS:
        (tmp_path / "small.yaml").write_bytes(encoded(text, encoding))
        assert [cell.concepts for cell in read_grid(str(tmp_path / "small.yaml")).cells] == [20, 40]
    (tmp_path / "small.yaml").write_bytes(text.encode() + b"# caf\xe9\n")
    with pytest.raises(InputError, match=r"small\.yaml, line 4: not UTF-8 text"):
        read_grid(str(tmp_path / "small.yaml"))


WORDS = ["ice", "café", "cafe\u0301", "slow cooking", "火山灰", "हिन्दी", 'say "no"', "a,b", "x;y", "two\nlines"]
WORDS += ["1\u20282", "🔥", " "]
PIECES = [
    b'"', b'""', b"\r", b"\n", b"\r\n", b",", b";", b"\t", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\xff\xfe",
    b"\xe9\0", b"x" * 5000, b'"' + b"y\n" * 3000, b"concept,category\n", b"\xe2\x80\xa8", b"",
]  # fmt: skip


def damaged(draw):
    """A list as someone may have it: rows of words in some form and encoding, and perhaps bytes added or lost."""
    rows = [[draw.choice(WORDS), draw.choice(WORDS)] for _ in range(draw.randrange(6))]
    header = draw.choice([["concept", "category"], [" Concept ", "CATEGORY"], ["id", "concept"], []])
    text = as_csv([header, *rows], draw.choice(",;\t"), draw.choice(["\n", "\r\n", "\r"]), draw.choice([0, 1]))
    content = bytearray(encoded(text, draw.choice(ENCODINGS)))
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        place = draw.randrange(len(content) + 1)
        end = min(len(content), place + draw.choice([0, 0, 1, 2, 7]))
        content[place:end] = draw.choice(PIECES)
    return bytes(content)


PLAIN_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32-le",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}


def decoded(content):
    """The lines of a list by a plainer way, all at once; None where it is no text."""
    mark = next((mark for mark in PLAIN_MARKS if content.startswith(mark)), b"")
    try:
        text = content[len(mark) :].decode(PLAIN_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError:
        return None
    lines = re.split("(?<=\n)|(?<=\r)(?!\n)", text)
    return None if "\0" in text else [line.lstrip("\ufeff") for line in lines]


def expected_rows(lines):
    """The rows of a list by a plainer way; None where it should be refused."""

    def name(column):
        return " ".join(unicodedata.normalize("NFC", column).casefold().split())

    lines = lines[next((place for place, line in enumerate(lines) if line.strip('",;\t\r\n ')), len(lines)) :]
    for separator in ",;\t":
        head = [name(column) for column in next(csv.reader(lines, delimiter=separator, skipinitialspace=True), [])]
        if head.count("concept") == head.count("category") == 1:
            break
    else:
        return None
    try:
        header, *rows = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    except csv.Error:
        return None
    rows = [[value.strip() for value in row] for row in rows]
    rows = [row for row in rows if any(row)]
    if any(any(row[len(header) :]) for row in rows):
        return None
    rows = [[(row + [""] * 9)[head.index(column)] for column in WANTED] for row in rows]
    return rows if all(all(row) for row in rows) and [name(column) for column in header] == head else None


def outcome(read):
    try:
        return [values for _, values in read()]
    except InputError as error:
        return str(error)


def check_list(content):
    """A damaged list is read exactly or refused in one line, as a table and as lines."""
    lines = decoded(content)
    rows, plain = (None, None) if lines is None else (expected_rows(lines), [line.strip() for line in lines])
    plain = plain and [line for line in plain if line]
    for found, expected in ((outcome(lambda: table(content)), rows), (outcome(lambda: texts(content)), plain)):
        if isinstance(found, str):
            assert expected is None, (content, found)
            assert re.fullmatch(r"list\.(csv|txt)(, line \d+)?: [^\n\r]+", found), found
        else:
            assert found == expected, content


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_list_is_read_exactly_or_refused(seed, monkeypatch):
    draw = random.Random(seed)
    for _ in range(500):
        monkeypatch.setattr(lists, "BLOCK", draw.choice([4, 7, 64, 1 << 20]))
        check_list(damaged(draw))
