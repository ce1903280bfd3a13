"""The catalogue is what it says, and its split leaks nothing."""

import random
from collections import Counter

import inflect
import pytest
from conftest import CATALOGUE

from pipeline.concepts import (
    Catalogue,
    balanced_order,
    by_categories,
    counts,
    read_catalogue,
    split,
    stem_groups,
    stems,
)
from pipeline.errors import InputError
from pipeline.features import Catalogued
from pipeline.vectors import read_vectors

CATEGORIES = {
    "Objects", "Actions", "Properties", "Abstract", "Emotions", "Science", "Technology", "Relationships", "Places",
    "Time", "Colors", "Math", "Food", "Professions", "Sports", "Arts", "Nature", "Body parts", "Materials",
}  # fmt: skip


def test_catalogue_has_enough_concepts_in_every_category(catalogue):
    sizes = Counter(catalogue.categories)
    assert set(sizes) == CATEGORIES
    assert min(sizes.values()) >= 80
    assert len(catalogue) >= 2000


def test_no_concept_stands_twice_in_any_case_or_number(catalogue):
    english = inflect.engine()

    def canonical(concept):
        words = concept.casefold().replace("-", " ").split()
        return " ".join([*words[:-1], english.singular_noun(words[-1]) or words[-1]])

    seen = Counter(canonical(concept) for concept in catalogue.concepts)
    assert [name for name, number in seen.items() if number > 1] == []


def test_split_holds_out_200_each_from_every_category_alike(catalogue):
    sides = split(catalogue)
    assert counts(sides)["val"] == counts(sides)["test"] == 200
    sizes = Counter(catalogue.categories)
    for side in ("val", "test"):
        held_out = Counter(c for c, s in zip(catalogue.categories, sides, strict=True) if s == side)
        for category, size in sizes.items():
            assert abs(held_out[category] - 200 * size / len(catalogue)) <= 1


def test_no_word_stem_stands_on_two_sides(catalogue):
    sides = split(catalogue)
    side_of = {}
    for concept, side in zip(catalogue.concepts, sides, strict=True):
        for stem in stems(concept):
            assert side_of.setdefault(stem, side) == side, concept


def test_split_and_order_do_not_depend_on_row_order(catalogue):
    rows = list(range(len(catalogue)))
    random.Random(0).shuffle(rows)
    shuffled = Catalogue(
        tuple(catalogue.concepts[row] for row in rows), tuple(catalogue.categories[row] for row in rows)
    )
    before = dict(zip(catalogue.concepts, split(catalogue), strict=True))
    assert dict(zip(shuffled.concepts, split(shuffled), strict=True)) == before
    orders = [
        [table.concepts[row] for row in balanced_order(table.concepts, table.categories)]
        for table in (catalogue, shuffled)
    ]
    assert orders[0] == orders[1]


def test_a_prefix_of_a_prefix_is_the_prefix_of_the_whole(catalogue):
    whole = balanced_order(catalogue.concepts, catalogue.categories)
    part = whole[:500]
    again = balanced_order([catalogue.concepts[r] for r in part], [catalogue.categories[r] for r in part])
    assert [part[place] for place in again] == part


def test_prefixes_are_spread_over_all_categories(catalogue):
    first = balanced_order(catalogue.concepts, catalogue.categories)[:100]
    sizes = Counter(catalogue.categories[row] for row in first)
    assert set(sizes) == CATEGORIES
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_prefixes_have_their_share_of_every_split(catalogue):
    sides = split(catalogue)
    first = balanced_order(catalogue.concepts, catalogue.categories)[:300]
    found = counts(sides[row] for row in first)
    assert 0.75 * 300 < found["train"] < 0.9 * 300
    assert min(found["val"], found["test"]) >= 15


def test_shared_stems_group_directly_and_through_others():
    groups = stem_groups(["ice", "ice cream", "creams", "point of view", "pair of scissors", "volcano"])
    assert sorted(map(sorted, groups)) == [[0, 1, 2], [3], [4], [5]]


def test_word_frequencies_give_a_catalogue_of_any_size():
    words = read_catalogue("wordfreq:en:3000")
    assert len(words) == len(set(words.concepts)) == 3000
    assert {"time", "people"} <= set(words.concepts)
    sides = dict(zip(words.concepts, split(words), strict=True))
    assert counts(sides.values()) == {"train": 2600, "val": 200, "test": 200}
    assert sides["year"] == sides["years"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "expected a header line"),
        (b"concept,category\n", "no concepts"),
        (b"word,kind\nice,Food\n", "expected a header line"),
        (b"concept,category\nice\n", "line 2: expected values for 'concept,category'"),
        (b"concept,category\nice,Food,extra\n", "line 2: expected values for 'concept,category'"),
        (b"concept,category\nice,Food\nfire,Nature\nIce,Nature\n", "line 4: 'Ice' stands already at line 2"),
        ("concept,category\ncafé,Food\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, content, complaint):
    path = tmp_path / "concepts.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"concepts\.csv") as caught:
        read_catalogue(str(path))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.csv", "wordfreq:en", "wordfreq:en:many", "wordfreq:xx:10"])
def test_a_source_that_does_not_exist_is_refused(source):
    with pytest.raises(InputError):
        read_catalogue(source)


def test_stems_are_those_of_the_language_that_is_named(workplace, run, tiny_folder):
    words = read_catalogue("wordfreq:de:1500").concepts
    rows = [f"{word},{'abcde'[place % 5]}\n" for place, word in enumerate(words)]
    (workplace / "german.csv").write_text("concept,category\n" + "".join(rows))
    found = {}
    for language in ((), ("--language", "de")):
        code, _, err = run("extract", "--teacher", tiny_folder("gpt2"), "--concepts", "german.csv", "--layers", 2,
                           "--no-vocabulary", "--output", f"{len(language)}.safetensors", *language)  # fmt: skip
        assert code == 0, err
        found[language] = read_vectors(workplace / f"{len(language)}.safetensors")
    english, german = found.values()
    assert (english.language, german.language) == ("en", "de")
    assert german.extraction_key != english.extraction_key
    assert leaks(english.concepts, english.splits)
    assert not leaks(german.concepts, german.splits)
    held = by_categories(german.concepts, german.categories, "de")
    assert not leaks(german.concepts, held)
    assert Catalogued(german)._categories_apart == held


def leaks(concepts, sides):
    """German stems on two sides of a split."""
    of_stem = {}
    for concept, side in zip(concepts, sides, strict=True):
        for stem in stems(concept, "de"):
            of_stem.setdefault(stem, set()).add(side)
    return [stem for stem, own in of_stem.items() if len(own - {"none"}) > 1]


def test_a_language_is_one_that_has_a_stemmer_and_that_of_its_words():
    with pytest.raises(InputError, match="unknown language 'xx'; available: da, de"):
        read_catalogue(str(CATALOGUE), "xx")
    with pytest.raises(InputError, match=r"--language de: .* are words of 'en'"):
        read_catalogue("wordfreq:en:20", "de")
    assert read_catalogue("wordfreq:de:20", "de").language == read_catalogue("wordfreq:de:20").language == "de"
