"""The catalogue is what it says, and its split leaks nothing."""

import random
import unicodedata
from collections import Counter
from pathlib import Path

import inflect
import pytest
from conftest import CATALOGUE
from safetensors import safe_open

from pipeline.data.concepts import (
    Catalogue,
    balanced_order,
    compute_split,
    counts,
    read_catalogue,
    split,
    split_by_category,
)
from pipeline.data.dataset import Dataset
from pipeline.data.stems import stem_groups, stems, words
from pipeline.data.vectors import read_vectors
from pipeline.errors import InputError

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


def test_the_split_of_the_catalogue_is_that_of_the_shipped_vectors(catalogue, vectors):
    assert dict(zip(catalogue.concepts, split(catalogue), strict=True)) == dict(
        zip(vectors.concepts, vectors.splits, strict=True)
    )


TOPICS = [
    "dates", "audio", "comedy", "travel", "taxes", "courts", "surgery", "botany", "algebra", "graphs", "servers",
    "fonts", "shoes", "trains", "football", "chess", "elections", "war", "religion", "archives", "poetry", "theatre",
    "storms", "rivers", "farming", "dogs", "birds", "insects", "fruit", "wine",
]  # fmt: skip
FORMS = ["references to {} and what belongs to them", "terms related to {}", "mentions of {} in documents",
         "phrases that describe {}", "words about {} and related terms"]  # fmt: skip
DESCRIPTIONS = Catalogue(
    tuple(form.format(topic) for topic in TOPICS for form in FORMS),
    tuple(("text", "code", "math")[number % 3] for number in range(len(TOPICS)) for _ in FORMS),
)


def test_descriptions_are_grouped_by_what_they_describe():
    found = compute_split(DESCRIPTIONS)
    assert counts(found.sides) == {"train": 120, "val": 15, "test": 15}
    sides = {}
    for place, side in enumerate(found.sides):
        sides.setdefault(TOPICS[place // len(FORMS)], set()).add(side)
    assert all(len(own) == 1 for own in sides.values())
    [line] = found.warnings
    assert line.startswith("common words (10: related, terms, ")
    assert line.endswith("on one side of the split; else 0 of 15 could be held out for validation or for test")
    apart = Catalogue(DESCRIPTIONS.concepts, tuple(topic for topic in TOPICS for _ in FORMS))
    assert counts(split_by_category(apart)) == {"train": 90, "val": 30, "test": 30}


@pytest.mark.parametrize("name", ["{}.n.01", "{}%1:05:00::", "the word {}", "{} (a noun)"])
def test_what_all_names_share_groups_nothing(catalogue, name):
    named = Catalogue(tuple(name.format(concept) for concept in catalogue.concepts), catalogue.categories)
    found = compute_split(named)
    assert counts(found.sides)["val"] == counts(found.sides)["test"] == 200
    side_of = {}
    for concept, side in zip(catalogue.concepts, found.sides, strict=True):
        for stem in stems(concept):
            assert side_of.setdefault(stem, side) == side, concept
    senses = ["dog.n.01", "dog.v.02", "hot_dog.n.01", "cat.n.01"]
    assert sorted(map(sorted, stem_groups(senses))) == [[0, 1, 2], [3]]


FAMILIES = [f"{kind} {family}" for family in ("ice", "wine", "oak", "tax") for kind in ("red", "old", "big", "odd")]


def test_what_cannot_be_held_out_is_said_with_numbers():
    found = compute_split(Catalogue(tuple(FAMILIES), ("a",) * 16))
    assert found.warnings == [
        "0 of 1 concepts are held out for validation and 0 of 1 for test: concepts that share a word, directly or "
        "through others, stay on one side, and the largest such group has 16 of 16"
    ]
    assert compute_split(Catalogue(("ice", "ice cream"), ("a", "a"))).warnings == []  # of so few none is asked for


@pytest.mark.parametrize(
    ("language", "concepts", "groups"),
    [
        ("fr", ["la glace de la mer", "une maison de pierre", "mer calme"], [[0, 2], [1]]),
        ("de", ["das Haus am Meer", "der Tag und die Nacht", "Häuser"], [[0, 2], [1]]),
        ("en", ["it is what we have", "it is raining", "we have what it is"], [[0, 2], [1]]),
        ("en", ["ज्वालामुखी", "हिन्दी", "ज्वालामुखी द्वीप"], [[0, 2], [1]]),  # vowels that combine with letters
        ("en", ["ภูเขาไฟ", "กระท่อม", "ชื่อ"], [[0], [1], [2]]),
        ("en", ["שָׁלוֹם", "סֵפֶר"], [[0], [1]]),
        ("en", ["می‌خواهم", "می‌روم"], [[0], [1]]),
        ("en", ["火山", "火山灰", "活火山", "山水", "東京タワー", "東京"], [[0, 1, 2], [3], [4, 5]]),
        ("en", ["食べる", "調べる"], [[0], [1]]),
        ("en", ["❤️", "☀️", "❤️ fire", "wild fire"], [[0], [1], [2, 3]]),
        ("en", ["x̂ axis", "x̂", "ŷ"], [[0, 1], [2]]),
        ("en", ["cafe\u0301", "café table", "cafe"], [[0, 1], [2]]),
    ],
)
def test_words_are_those_of_the_language_and_the_script(language, concepts, groups):
    assert sorted(map(sorted, stem_groups(concepts, language))) == groups


def test_letters_and_digits_make_words_whatever_stands_between_them():
    assert words("Ice-cream, 2 scoops_of 'it'") == ["ice", "cream", "2", "scoops", "of", "it"]
    assert words("Crème brûlée™ №5") == ["crème", "brûlée", "5"]


def test_the_same_word_in_another_unicode_form_is_the_same(tmp_path):
    accented = [word for word in read_catalogue("wordfreq:fr:3000").concepts if not word.isascii()]
    composed, apart = (
        Catalogue(tuple(unicodedata.normalize(form, word) for word in accented), ("a",) * len(accented), "fr")
        for form in ("NFC", "NFD")
    )
    assert split(composed) == split(apart)
    assert balanced_order(composed.concepts, composed.categories) == balanced_order(apart.concepts, apart.categories)
    path = tmp_path / "concepts.csv"
    path.write_text("concept,category\ncafe\u0301 noir,Cafe\u0301s\n")
    assert read_catalogue(str(path)) == Catalogue(("café noir",), ("Cafés",))
    path.write_text("concept,category\ncafe\u0301 noir,Food\nCafé  noir,Food\n")
    with pytest.raises(InputError, match="line 3: 'Café  noir' stands already at line 2; name each concept once"):
        read_catalogue(str(path))


def test_a_concept_of_several_lines_is_one_phrase(tmp_path):
    path = tmp_path / "concepts.csv"
    content = 'concept;category\r\n"longing for a place \r\nthat never was";feelings\r\n"a\u2028b";x\r\n'
    path.write_bytes(content.encode())
    assert read_catalogue(str(path)).concepts == ("longing for a place that never was", "a b")


def test_extract_says_what_the_split_lacks_and_reads_no_wrong_list(workplace, run, tiny_folder, caplog):
    common = ("extract", "--teacher", tiny_folder("gpt2"), "--layers", 2, "--no-vocabulary", "--concepts")
    Path("wrong.csv").write_text('concept,category\n"ice,Food\nfire,"Nature"\n')
    before = set(Path().iterdir())
    code, out, err = run(*common, "wrong.csv", "--output", "v.safetensors")
    assert (code, out) == (2, "")
    assert err.startswith("error: concepts file wrong.csv, line 2: a quote that is not closed")
    assert set(Path().iterdir()) == before
    for name, listed, expected in (
        ("descriptions", DESCRIPTIONS.concepts, "warning: common words (10: related"),
        ("families", FAMILIES, "warning: 0 of 1 concepts are held out"),
    ):
        Path(f"{name}.csv").write_text("concept,category\n" + "".join(f"{concept},a\n" for concept in listed))
        code, _, err = run(*common, f"{name}.csv", "--output", f"{name}.safetensors")
        assert code == 0, err
        assert expected in caplog.text
    with safe_open("descriptions.safetensors", "np") as file:
        assert Counter(file.metadata()["splits"].split('"'))["val"] == 15
    code, _, err = run("train", "--vectors", "families.safetensors", "--no-report", "--student", "ridge")
    assert code == 2
    assert err.endswith("concepts that share words stay together, and 16 of 16 do; extract others besides\n")


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
    held = split_by_category(german.catalogue)
    assert not leaks(german.concepts, held)
    assert Dataset(german)._categories_apart == held


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
