"""Pools add training concepts, and what measures students stays that of the judge alone."""

import json
from pathlib import Path

import pytest
from conftest import CATALOGUE

from pipeline.data.concepts import Catalogue, Source, counts, read_catalogue, split, split_by_category
from pipeline.data.dataset import Dataset
from pipeline.data.pools import read_pools, source_names
from pipeline.data.stems import stems
from pipeline.data.vectors import read_header, read_vectors
from pipeline.errors import InputError

JUDGE = str(CATALOGUE)


@pytest.fixture(scope="module")
def pooled():
    return read_pools([JUDGE, "wordfreq:en:20000"])[0]


def side_of(catalogue):
    return dict(zip(catalogue.concepts, split(catalogue), strict=True))


def training_order(catalogue):
    sides = split(catalogue)
    return [catalogue.concepts[row] for row in catalogue.order() if sides[row] == "train"]


def test_what_is_held_out_is_what_the_judge_alone_holds_out(catalogue, pooled):
    alone, joined = side_of(catalogue), side_of(pooled)
    for side in ("val", "test"):
        held = {concept for concept, own in joined.items() if own == side}
        assert held == {concept for concept, own in alone.items() if own == side}
        assert len(held) == 200
    assert counts(joined.values())["train"] > 15_000


def test_no_stem_of_a_held_out_concept_is_in_training(pooled):
    found = {"train": set(), "val": set(), "test": set()}
    for concept, side in side_of(pooled).items():
        found[side] |= stems(concept)
    assert not found["train"] & (found["val"] | found["test"])


def test_the_judges_training_concepts_come_first_in_their_own_order(catalogue, pooled):
    alone, joined = training_order(catalogue), training_order(pooled)
    assert joined[: len(alone)] == alone
    rest = joined[len(alone) :]
    assert rest[:50] != list(pooled.concepts[len(catalogue) : len(catalogue) + 50])
    shorter = training_order(read_pools([JUDGE, "wordfreq:en:10000"])[0])[len(alone) :]
    known = set(shorter)
    assert [concept for concept in rest if concept in known] == shorter  # by hash, whatever else is there


def test_concepts_are_taken_once_from_the_first_source_that_names_them(tmp_path):
    judge, more, phrases = (tmp_path / name for name in ("judge.csv", "more.csv", "phrases.txt"))
    judge.write_text("concept,category\nice,Food\nhot tea,Food\n")
    more.write_text("concept,category\nHot  Tea,Drinks\ngreen tea,Drinks\n")
    phrases.write_text("oak\n\nGreen Tea\r\n Oak \nice\ncafe\u0301\n")
    found, lines = read_pools([str(judge), str(more), str(phrases)])
    assert found.concepts == ("ice", "hot tea", "green tea", "oak", "café")
    assert found.categories == ("Food", "Food", "Drinks", "phrase", "phrase")
    assert found.sources == (Source(str(judge), 2), Source(str(more), 1), Source(str(phrases), 2))
    assert found.judge == str(judge)
    assert lines == [
        f"{more}: 1 of 2 concepts are taken; left out: 1 named before",
        f"{phrases}: 2 of 5 concepts are taken; left out: 3 named before",
    ]
    alone, lines = read_pools([str(phrases)])
    assert (alone.concepts, alone.sources, alone.judge) == (("oak", "Green Tea", "ice", "café"), (), "")
    assert lines == [f"{phrases}: 4 of 5 concepts are taken; left out: 1 named before"]


def test_a_source_of_its_own_is_the_catalogue_as_before(catalogue):
    assert read_pools([JUDGE]) == read_pools([JUDGE], judge=JUDGE) == (catalogue, [])
    words = "wordfreq:de:3000"  # some of which are alike without letter case
    assert read_pools([words]) == (read_catalogue(words), [])


def test_the_judge_is_named_or_the_first_table(catalogue):
    pool = "wordfreq:en:3000"
    assert read_pools([JUDGE, pool])[0].judge == JUDGE
    undecided = read_pools([pool, JUDGE])[0]
    assert (undecided.judge, undecided.sources[0]) == ("", Source(pool, 3000))
    assert undecided.judged is undecided
    for given in ([pool], [pool, JUDGE]):
        assert read_pools(given, judge=JUDGE) == read_pools([JUDGE, pool])
    assert side_of(read_pools([JUDGE], judge=pool)[0]).items() >= side_of(read_catalogue(pool)).items()


def test_whole_categories_are_held_out_from_pools_too():
    judged = [(f"{word}{number}", word) for word in ("ash", "elm", "fir") for number in range(5)]
    pool = [("elm1 tree", "x"), ("red elm", "elm"), ("fir2", "y"), ("lead", "ash"), ("zinc", "z")]
    concepts, categories = zip(*judged, *pool, strict=True)
    sources = (Source("judge.csv", len(judged)), Source("pool.csv", len(pool)))
    sides = split_by_category(Catalogue(concepts, categories, "en", sources, "judge.csv"))
    assert sides[: len(judged)] == split_by_category(Catalogue(concepts[: len(judged)], categories[: len(judged)]))
    by_category = dict(zip(categories[: len(judged)], sides, strict=False))
    kept = {category for category, side in by_category.items() if side == "train"}
    expected = {"elm1 tree": "elm", "red elm": "elm", "fir2": "fir", "lead": "ash", "zinc": None}
    for (concept, _), side in zip(pool, sides[len(judged) :], strict=True):
        category = expected[concept]
        assert side == ("train" if category is None or category in kept else "none"), concept


def test_fewer_concepts_are_the_first_of_the_order(catalogue, pooled):
    few = pooled.take(pooled.first(700))
    assert few == catalogue.take(catalogue.first(700))  # with neither sources nor judge: an extraction of its own
    more = pooled.take(pooled.first(5000))
    assert more.sources == (Source(JUDGE, len(catalogue)), Source("wordfreq:en:20000", 5000 - len(catalogue)))
    assert training_order(more) == training_order(pooled)[: len(training_order(more))]


def test_words_that_group_nothing_leave_no_concept_out(tmp_path):
    judge, pool = tmp_path / "judge.csv", tmp_path / "pool.txt"
    words = read_catalogue("wordfreq:en:230").concepts
    judge.write_text("concept,category\n" + "".join(f"terms related to {word},a\n" for word in words[:200]))
    held_out = [name for name, side in side_of(read_catalogue(str(judge))).items() if side == "test"]
    assert len(held_out) == 20
    topics = [name.removeprefix("terms related to ") for name in held_out]
    pool.write_text("\n".join(["relation", "long terms", *topics]))
    found = read_pools([str(judge), str(pool)])[0]
    assert {"relation", "long terms"} <= set(found.concepts[200:])
    assert len(found) <= 202


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["a.csv,"], r"--concepts 'a.csv,': expected sources with commas between them"),
        (["a.csv,b.txt", "a.csv"], "--concepts a.csv: given twice"),
    ],
)
def test_names_stand_apart(given, complaint):
    with pytest.raises(InputError, match=complaint):
        source_names(given)


def test_names_of_sources_have_commas_between_them_unless_a_file_is_so_called(workplace):
    assert source_names(["a.csv, wordfreq:en:10", "b.txt"]) == ["a.csv", "wordfreq:en:10", "b.txt"]
    Path("this,that.csv").write_text("")
    assert source_names(["this,that.csv"]) == ["this,that.csv"]


def test_a_wrong_source_is_named(tmp_path):
    empty, table, words = (tmp_path / name for name in ("empty.txt", "table", "words.txt"))
    empty.write_text("\n \n")
    table.write_text("\nCategory;Concept\nFood;ice\n")
    words.write_bytes(b"ice\ncaf\xe9\n")
    for names, language, complaint in (
        ([empty], None, r"empty\.txt: no concepts"),
        ([table], None, r"table, line 2: the header of a table; name the file \.csv or \.tsv"),
        ([words], None, r"words\.txt, line 2: not UTF-8"),
        ([words], "xx", "unknown language 'xx'"),
        ([tmp_path / "none.txt"], None, r"none\.txt: No such file"),
        ([JUDGE, "wordfreq:de:20"], None, r"wordfreq:de:20: words of 'de', and .* read as 'en'; give one --language"),
        ([JUDGE, "wordfreq:de:20"], "fr", r"--language fr: .* are words of 'de'"),
    ):
        with pytest.raises(InputError, match=complaint):
            read_pools(list(map(str, names)), language=language)
    assert read_pools([JUDGE, "wordfreq:de:20"], language="de")[0].language == "de"


def test_an_extraction_of_several_sources_says_so_and_trains_on_more(workplace, run, tiny_folder, caplog):
    caplog.set_level("INFO")
    Path("judge.csv").write_text("".join(CATALOGUE.read_text().splitlines(keepends=True)[:201]))
    held_out = [name for name, side in side_of(read_catalogue("judge.csv")).items() if side != "train"]
    Path("phrases.txt").write_text("\n".join([*read_catalogue(JUDGE).concepts[100:500], f"big {held_out[0]}"]))
    common = ("extract", "--teacher", tiny_folder("gpt2"), "--layers", 2, "--no-vocabulary", "--concepts")
    code, _, err = run(*common, "judge.csv", "--concepts", "phrases.txt", "--output", "pool.safetensors")
    assert code == 0, err
    assert "phrases.txt: 300 of 401 concepts are taken; left out: 100 named before, 1 with a word" in caplog.text
    code, _, err = run(*common, "judge.csv", "--output", "alone.safetensors")
    assert code == 0, err
    joined, alone = (read_vectors(Path(f"{name}.safetensors")) for name in ("pool", "alone"))
    assert (alone.sources, alone.judge) == ((), "")
    assert not {"sources", "judge"} & set(read_header(Path("alone.safetensors")))
    assert joined.sources == (Source("judge.csv", 200), Source("phrases.txt", len(joined.concepts) - 200))
    assert joined.judge == "judge.csv"
    assert json.loads(read_header(Path("pool.safetensors"))["sources"])[0] == ["judge.csv", 200]
    more, few = Dataset(joined), Dataset(alone)
    for side in ("val", "test"):
        assert more.rows(side) == few.rows(side)  # the judge's rows come first
    train = few.rows("train")
    assert more.rows("train")[: len(train)] == train
    assert len(more.rows("train")) == len(joined.concepts) - 40
    code, out, err = run(*common, "judge.csv,phrases.txt", "--judge", "", "--output", "pool.safetensors")
    assert code == 0, err
    assert "nothing to do" in out
    train = ("train", "--vectors", "pool.safetensors", "--concepts", 300, "--student", "ridge", "--no-report")
    code, _, err = run(*train)
    assert code == 0, err
