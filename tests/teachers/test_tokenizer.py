"""Tokenizers of teachers: damaged, missing, of another model, changed, and what they put around a prompt."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import find_vocabulary

from pipeline.data.concepts import Catalogue
from pipeline.data.vectors import read_vectors
from pipeline.errors import InputError
from pipeline.extraction.reader import read_texts
from pipeline.extraction.request import make_request
from pipeline.student.student import Student
from pipeline.teachers.find import find_teacher
from pipeline.teachers.load import load_teacher
from pipeline.teachers.prompts import template_prefix, tokenize
from pipeline.teachers.tokenizer import hash_tokenizer

WHOLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
EXTRACT = (
    "extract", "--concepts", ROOT / "data" / "concepts.csv", "--num-concepts", 120, "--layers", 2, "--dtype", "float32",
    "--output", "v.safetensors",
)  # fmt: skip
TRAIN = ("train", "--vectors", "v.safetensors", "--concepts", 40, "--epochs", 1, "--no-report", "--output", "mine")
PROMPT = "Tell me about {concept}"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a tiny Llama, whose tokenizer may be changed."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "tiny"))


def load(folder):
    return load_teacher(find_teacher(str(folder), "float32"))


def change(path, **values):
    """Put other values into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_json(part):
    """A part of a tokenizer as it stands in ``tokenizer.json``."""
    return json.loads(part.__getstate__())


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def call_it(folder, name):
    change(folder / SETTINGS, tokenizer_class=name)


def unpack(folder):
    """Leave the files of a tokenizer that there were before ``tokenizer.json``."""
    model = json.loads((folder / WHOLE).read_text())["model"]
    (folder / WHOLE).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    call_it(folder, "GPT2Tokenizer")


def half_a_vocabulary(folder):
    unpack(folder)
    halve(folder / "vocab.json")


def without_merges(folder):
    unpack(folder)
    (folder / "merges.txt").unlink()


def with_other_merges(folder):
    unpack(folder)
    (folder / "merges.txt").write_text("#version: 0.2\nĠq ñ\n")


def without_kind(folder):
    unpack(folder)
    (folder / SETTINGS).unlink()


def remove(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def remove_whole(folder):
    """Of a class of which transformers makes an empty tokenizer without a word."""
    (folder / WHOLE).unlink()
    call_it(folder, "LlamaTokenizer")


def sentencepiece_only(folder):
    remove_whole(folder)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def empty(folder):
    model = {"type": "BPE", "vocab": {}, "merges": []}
    change(folder / WHOLE, model=model, added_tokens=[], post_processor=None)


def of_words(folder, *words, unknown):
    """A tokenizer of whole words."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


CONTENTS = [  # of a file, and what is said of it
    (WHOLE, b"", "is empty"),
    (WHOLE, b"<html>", "is cut short or no JSON"),
    (WHOLE, b"\xff\x00" * 99, "is cut short or no JSON"),
    (WHOLE, b"[1]", "is no JSON object"),
    (WHOLE, b"null", "is no JSON object"),
    (WHOLE, b'{"a": 1}', "is no tokenizer, or of a newer version than tokenizers"),
    (WHOLE, b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS.* git lfs pull"),
    (SETTINGS, b"", "is empty"),
    (SETTINGS, b"[]", "is no JSON object"),
    (SETTINGS, b'{"tokenizer_class": ', "is cut short or no JSON"),
    ("added_tokens.json", b"{", "is cut short or no JSON"),
    ("special_tokens_map.json", b"[]", "is no JSON object"),
]
DAMAGE = {
    "half": (lambda folder: halve(folder / WHOLE), r"tokenizer\.json is cut short or no JSON"),
    "newer": (lambda folder: change(folder / WHOLE, post_processor={"type": "Newer"}), "newer version than tokenizers"),
    "no tokens": (empty, "gives a text no token"),
    "missing": (remove, r"cannot be used: no tokenizer\.json; put"),
    "made empty": (remove_whole, r"cannot be used: no tokenizer\.json; put"),
    "renamed": (
        lambda folder: (folder / WHOLE).rename(folder / "my-tokenizer.json"),
        r"\(my-tokenizer\.json has anoth",
    ),
    "of other words": (lambda folder: call_it(folder, "BertTokenizer"), "BertTokenizer"),
    "of other files": (lambda folder: call_it(folder, "T5Tokenizer"), "'T5Tokenizer' in tokenizer_config.json with"),
    "a number": (lambda folder: call_it(folder, 3), "tokenizer_class 3 in tokenizer_config.json"),
    "half a vocabulary": (half_a_vocabulary, r"vocab\.json is cut short"),
    "no merges": (without_merges, r"vocab\.json has no merges\.txt"),
    "other merges": (with_other_merges, r"GPT2Tokenizer does not read vocab\.json, merges\.txt"),
    "no kind": (
        without_kind,
        r"no tokenizer_class in tokenizer_config\.json that says how to read vocab\.json, merges",
    ),
    "SentencePiece": (sentencepiece_only, r"tokenizer\.model needs the sentencepiece package \(pip install"),
    "no unknown": (
        lambda folder: of_words(folder, "a", unknown="?"),
        r"tokenizer\.json does not work \(WordLevel error",
    ),
    "no words": (lambda folder: of_words(folder, "?", unknown="?"), "knows no word"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), CONTENTS)
def test_a_damaged_file_is_refused_by_its_name(folder, name, content, complaint):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{folder} cannot be used: {re.escape(name)} {complaint}[^\n]*$"):
        load(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_make_a_tokenizer_are_refused(folder, damage):
    apply, complaint = DAMAGE[damage]
    apply(folder)
    with pytest.raises(InputError, match=complaint) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_the_command_line_refuses_it_in_one_line(workplace, run, folder):
    halve(folder / WHOLE)
    code, _, err = run(*EXTRACT, "--teacher", folder)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: --teacher tiny: the tokenizer in {folder} cannot be used")
    assert not list(workplace.glob("v.safetensors"))


ENOUGH = {
    "vocabulary and merges": unpack,
    "no settings": lambda folder: (folder / SETTINGS).unlink(),
    "an unknown class": lambda folder: call_it(folder, "Unheard"),
}


@pytest.mark.parametrize("apply", ENOUGH.values(), ids=ENOUGH)
def test_files_that_are_enough_are_taken(folder, apply):
    texts = ["volcano", "slow cooking"]
    expected = [prompt.concept_ids for prompt in tokenize(load(folder), texts, PROMPT)]
    apply(folder)
    assert [prompt.concept_ids for prompt in tokenize(load(folder), texts, PROMPT)] == expected


BOS, PAD = ("<bos>", 1), ("<pad>", 0)
ENDINGS = {
    "template": processors.TemplateProcessing(single="<bos> $A <pad> <pad>", special_tokens=[BOS, PAD]),
    "roberta": processors.RobertaProcessing(PAD, BOS, trim_offsets=False),
    "bert": processors.BertProcessing(PAD, BOS),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_a_tokenizer_appends_is_not_read(folder, caplog, ending):
    texts = ["volcano", "slow cooking", "a 😀", "<pad>", "山"]
    plain = load(folder)
    change(folder / WHOLE, post_processor=as_json(ENDINGS[ending]))
    with caplog.at_level("INFO"):
        ends = load(folder)
    assert ends.tokenizer("a")["input_ids"][-1] == 0
    assert "ends prompts with <pad>" in caplog.text
    for template in (PROMPT, "{concept}", "What is {concept} like?"):
        assert tokenize(ends, texts, template) == tokenize(plain, texts, template)
        assert template_prefix(ends, template) == template_prefix(plain, template)
    for pool in ("last", "mean"):
        expected, found = (read_texts(teacher, texts, PROMPT, 2, pool) for teacher in (plain, ends))
        np.testing.assert_array_equal(found, expected)


def test_an_end_token_that_the_text_or_the_template_has_is_read(folder):
    change(folder / WHOLE, post_processor=as_json(ENDINGS["template"]))
    teacher = load(folder)
    [prompt] = tokenize(teacher, ["a <pad>"], PROMPT)
    assert prompt.token_ids[-1] == prompt.concept_ids[-1] == 0
    [prompt] = tokenize(teacher, ["volcano"], "{concept}<pad>")
    assert prompt.token_ids[prompt.pooled("last")[0]] == 0
    assert 0 not in prompt.concept_ids


NORMALIZERS = [normalizers.Lowercase(), normalizers.NFKC(), normalizers.NFD(), normalizers.BertNormalizer()]


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_the_concepts_own_tokens_are_found_whatever_the_tokenizer_makes_of_the_text(folder, normalizer):
    change(folder / WHOLE, normalizer=as_json(normalizer))
    teacher = load(folder)
    texts = ["Volcano", "ﬁre İstanbul", "naïve É", "x²", "😀😀", "山"]
    for template in ("Tell ME about ﬁve {concept}", "{concept} İS", "É {concept}, and so on"):
        for text, prompt in zip(texts, tokenize(teacher, texts, template), strict=True):
            own = teacher.tokenizer.decode(prompt.concept_ids)
            assert own.replace(" ", "") == normalizer.normalize_str(text).replace(" ", "")


def add_token(folder, token):
    """Add a token and leave the embeddings as they are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": token})
    tokenizer.save_pretrained(folder)
    return tokenizer.pad_token_id


def test_a_token_without_an_embedding_is_refused_where_a_text_has_it(workplace, run, folder):
    assert add_token(folder, "[PAD]") == 600
    code, _, err = run(*EXTRACT, "--teacher", folder)
    assert code == 0, err
    code, out, err = run(*TRAIN, "--student", "ridge")
    assert code == 0, err
    assert "answers for any text" in out
    student = Student.load("mine")
    assert student.encode(["a phrase never heard", "PAD"]).shape == (2, 32)
    for texts in (["fine", "a [PAD]", "fine"], ["[PAD]"]):
        with pytest.raises(InputError, match=r"\[PAD\]': the teacher has no embedding for the token '\[PAD\]'"):
            student.encode(texts)
    with pytest.raises(InputError, match=r"no embedding for the token '\[PAD\]' in it \(number 600 of 600 rows\)"):
        tokenize(load(folder), ["fine", "a [PAD]"], PROMPT)


def test_a_tokenizer_of_another_model_is_refused_or_warned_of(folder, caplog):
    model = json.loads((folder / WHOLE).read_text())["model"]
    more = {f"<more {number}>": number for number in range(len(model["vocab"]), 700)}
    change(folder / WHOLE, model=model | {"vocab": model["vocab"] | more})
    with pytest.raises(InputError, match="700 tokens and its embedding table 600 rows, so they are of two models"):
        load(folder)
    of_words(folder, "?", "Tell", "me", "about", unknown="?")
    load(folder)
    assert "its tokenizer has 4 tokens and its embedding table 600 rows; is the tokenizer that of" in caplog.text


def test_a_teacher_is_known_by_its_tokenizer_too(workplace, run, folder, caplog):
    code, _, err = run(*EXTRACT, "--teacher", folder)
    assert code == 0, err
    code, _, err = run(*TRAIN, "--student", "ridge")
    assert code == 0, err
    held = read_vectors(Path("v.safetensors"))
    assert held.tokenizer == hash_tokenizer(folder) == Student.load("mine").config["tokenizer"]

    change(folder / SETTINGS, chat_template="{{ messages }}")  # which makes no difference to a prompt
    code, out, err = run(*EXTRACT, "--teacher", folder)
    assert "nothing to do" in out

    change(folder / WHOLE, post_processor=None)
    code, _, err = run(*EXTRACT, "--teacher", folder)
    assert code == 2
    assert f"tokenizer {held.tokenizer}, asked for {hash_tokenizer(folder)}" in err

    caplog.clear()
    code, _, err = run("predict", "volcano", "--compare", "--run", "mine", "--teacher", folder)
    assert code == 0, err
    assert "its tokenizer files (" in caplog.text
    assert "its weights (" not in caplog.text

    Path("v.vocabulary.safetensors").unlink()
    caplog.clear()
    assert find_vocabulary(held, "v.safetensors") is None
    assert "tiny: another tokenizer than the vectors'" in caplog.text


def test_vectors_that_do_not_name_their_tokenizer_are_taken_over(folder):
    source = find_teacher(str(folder), "float32")
    words = Catalogue(("volcano", "river"), ("any", "any"))
    now, before, other = (
        make_request(one, words, layers="2", templates=["{concept}"])
        for one in (source, replace(source, tokenizer=""), replace(source, tokenizer="sha256:0"))
    )
    assert "tokenizer" not in before.header
    assert now.is_answered_by(before.header)
    assert now.is_answered_by(now.header)
    assert not now.is_answered_by(other.header)
    assert not before.is_answered_by(now.header)
    assert not now.is_answered_by(None)
