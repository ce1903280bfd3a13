"""A vector is that of the plain forward pass, whatever else runs with it; work that was stopped goes on."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import ARCHITECTURES, CATALOGUE, ROOT, WHOLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import hub
from pipeline.data.concepts import Catalogue, Source, split
from pipeline.data.vectors import read_vectors
from pipeline.errors import InputError, WorkError
from pipeline.extraction.parts import PartPlan, merge, read_parts
from pipeline.extraction.request import is_extracted, make_request, read_output_header
from pipeline.processes import Worker
from pipeline.storage import Output
from pipeline.teachers import gguf
from pipeline.teachers.find import find_teacher, parse_layers
from pipeline.teachers.load import load_teacher
from pipeline.teachers.residuals import residuals

CONCEPTS = ("ice", "ice cream", "volcano", "slow cooking", "a", "theory of general relativity", "down-to-earth")
FEW = Catalogue(CONCEPTS, ("any",) * len(CONCEPTS))
TEMPLATES = ("Tell me about {concept}", "{concept}", "The word {concept} means that")


def extract(teacher, catalogue, folder, *, batch_tokens=64, workers=1, **asked):
    """The whole way in this process: request, parts, file."""
    source, model = teacher
    asked = {"layers": "all", "templates": TEMPLATES, **asked}
    request = make_request(source, catalogue, **asked)
    output = folder / "vectors.safetensors"
    output.unlink(missing_ok=True)
    plan = PartPlan.open(Output(output), request, model.embedding_table.shape[1], workers, batch_tokens)
    for index in reversed(range(workers)):
        read_parts(model, request, plan, plan.missing(Worker(index, workers)), batch_tokens)
    merge(request, plan)
    return read_vectors(output)


def plain(model, text, pooled):
    """The plain forward pass of one prompt: hidden states of all blocks, the last before the final norm."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    last = {}
    hook = model.blocks[-1].register_forward_hook(
        lambda module, args, output: last.update(value=output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        states = list(model.model(ids, output_hidden_states=True).hidden_states)[: len(model.blocks) + 1]
    hook.remove()
    states[len(model.blocks) :] = [last["value"]]
    return torch.stack([state[0, pooled].float().mean(0) for state in states]).numpy()  # [layers, d_model]


def own_tokens(model, template, concept):
    start = template.index("{")
    spans = model.tokenizer(template.replace("{concept}", concept), return_offsets_mapping=True)["offset_mapping"]
    return [place for place, (a, b) in enumerate(spans) if a < start + len(concept) and b > start]


def assert_plain(model, found, layers=slice(None)):
    for (row, concept), (column, template) in itertools.product(enumerate(found.concepts), enumerate(found.templates)):
        pooled = [-1] if found.pool == "last" else own_tokens(model, template, concept)
        alone = plain(model, template.replace("{concept}", concept), pooled)[layers]
        error = np.linalg.norm(found.vectors[row, column] - alone, axis=-1) / np.linalg.norm(alone, axis=-1)
        assert error.max() < 1e-3, (concept, template)


def load(folder, dtype="auto"):
    source = find_teacher(str(folder), dtype)
    return source, load_teacher(source)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request, tiny_folder):
    return load(tiny_folder(request.param))


@pytest.fixture(scope="module", params=WHOLE)
def unshared(request, tiny_folder):
    return load(tiny_folder(request.param))


def test_the_architectures_share_prefixes(tiny, tmp_path, caplog):
    before = tiny[1].model.config._attn_implementation
    extract(tiny, FEW, tmp_path)
    assert "runs whole" not in caplog.text
    assert tiny[1].model.config._attn_implementation == before


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
def test_every_batch_gives_the_vector_of_one_prompt_alone(tiny, tmp_path, padding_side, batch_tokens):
    tiny[1].tokenizer.padding_side = padding_side
    assert_plain(tiny[1], extract(tiny, FEW, tmp_path, batch_tokens=batch_tokens))


@pytest.mark.system
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_asked_for_is_the_plain_pass(tiny, catalogue, tmp_path, data):
    words = data.draw(st.lists(st.sampled_from(catalogue.concepts), min_size=1, max_size=9, unique=True))
    around = st.lists(st.sampled_from(["Tell me", "of", "a", "\n", "means", ", the"]), max_size=4).map(" ".join)
    asked = st.tuples(around, st.sampled_from(["", " "]), around).map(lambda t: f"{t[0]}{t[1]}{{concept}} {t[2]}")
    found = extract(
        tiny,
        Catalogue(tuple(words), ("any",) * len(words)),
        tmp_path,
        templates=data.draw(st.lists(asked, min_size=1, max_size=3, unique=True)),
        layers=data.draw(st.lists(st.integers(0, 4), min_size=1).map(lambda found: ",".join(map(str, found)))),
        pool=data.draw(st.sampled_from(["last", "mean"])),
        batch_tokens=data.draw(st.integers(1, 60)),
        workers=data.draw(st.integers(1, 3)),
    )
    assert_plain(tiny[1], found, list(found.layers))


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_teachers_whose_attention_cannot_be_exchanged_run_whole(unshared, tmp_path, pool, caplog):
    # The last block only: hidden states are counted differently in a Mamba.
    found = extract(unshared, FEW, tmp_path, pool=pool, batch_tokens=20, layers="4")
    assert "runs whole" in caplog.text
    assert_plain(unshared[1], found, [4])


def test_the_concepts_tokens_and_their_embeddings_are_in_the_file(tiny, tmp_path):
    found = extract(tiny, FEW, tmp_path, workers=3)
    table = tiny[1].embedding_table.detach().numpy()
    for row, concept in enumerate(CONCEPTS):
        start, stop = found.token_offsets[row : row + 2]
        assert tiny[1].tokenizer.decode(found.token_ids[start:stop]).strip() == concept
        expected = table[found.token_ids[start:stop]]
        np.testing.assert_allclose(found.token_embeddings[found.token_rows[row]], expected, atol=1e-3)


def test_every_token_of_the_concepts_is_also_read_by_itself(tiny, tmp_path):
    found = extract(tiny, FEW, tmp_path, workers=3, token_block=2)
    assert found.token_block == 2
    model = tiny[1]
    before = model.tokenizer("Tell me about")["input_ids"]
    for token, activation in zip(found.token_vocab.tolist(), found.token_activations, strict=True):
        expected = residuals(model, torch.tensor([[*before, token]]), (2,))[0, 0, -1].numpy()
        np.testing.assert_allclose(activation, expected, rtol=2e-3, atol=2e-3)
    assert extract(tiny, FEW, tmp_path).token_activations.shape == (0, model.embedding_table.shape[1])


def test_nothing_past_the_deepest_block_is_run(tiny):
    model = tiny[1]
    ran = []
    hooked = [(len(block._forward_hooks), len(block._forward_pre_hooks)) for block in model.blocks]
    hooks = [
        block.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
        for number, block in enumerate(model.blocks, start=1)
    ]
    residuals(model, torch.tensor([[5, 6, 7]]), (0, 2))
    for hook in hooks:
        hook.remove()
    assert ran == [1, 2]
    assert [(len(block._forward_hooks), len(block._forward_pre_hooks)) for block in model.blocks] == hooked


@pytest.mark.system
def test_fewer_concepts_keep_their_split_and_their_vectors(tiny, catalogue, tmp_path):
    whole = dict(zip(catalogue.concepts, split(catalogue), strict=True))
    few, fewer = (extract(tiny, catalogue, tmp_path, count=count, layers="2") for count in (60, 30))
    assert set(fewer.concepts) < set(few.concepts)
    assert len(set(fewer.categories)) == 19
    assert all(whole[concept] == side for concept, side in zip(few.concepts, few.splits, strict=True))
    for row, concept in enumerate(fewer.concepts):
        np.testing.assert_allclose(fewer.vectors[row], few.vectors[few.concepts.index(concept)], rtol=2e-3, atol=2e-3)


def centred_cosine(a, b, mean):
    a, b = a.astype(np.float64) - mean, b.astype(np.float64) - mean
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.system
def test_the_shipped_vectors_are_those_of_the_embedded_teacher(smollm2, catalogue, vectors, tmp_path):
    again = extract(smollm2, catalogue, tmp_path, count=60, layers="1,2,4,6,15,22", templates=TEMPLATES[:1])
    rows = [vectors.concepts.index(concept) for concept in again.concepts]
    mean = vectors.vectors.astype(np.float64).mean(0)
    assert centred_cosine(again.vectors, vectors.vectors[rows], mean).min() > 0.9999
    assert (again.teacher, again.revision) == (vectors.teacher, vectors.revision)


@pytest.mark.system
def test_the_embedded_teacher_agrees_with_its_plain_forward_pass(smollm2, tmp_path):
    assert_plain(smollm2[1], extract(smollm2, FEW, tmp_path))
    assert_plain(smollm2[1], extract(smollm2, FEW, tmp_path, pool="mean"))


@pytest.mark.system
def test_a_packed_teacher_is_kept_unpacked_with_the_same_weights(smollm2, tmp_path, monkeypatch):
    source, model = smollm2
    [kept] = (hub.cache() / "unpacked").glob(f"{source.revision[:32]}-*-{gguf.FORM}")
    assert (kept / "model.safetensors").stat().st_mode & 0o777 == 0o644
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))  # no cache can be made there
    anew = load_teacher(source)
    for one, other in ((model.model, anew.model), (model.causal, anew.causal)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert model.tokenizer.backend_tokenizer.to_str() == anew.tokenizer.backend_tokenizer.to_str()


@pytest.mark.system
def test_bfloat16_keeps_the_direction(catalogue, vectors, tmp_path):
    source = find_teacher("smollm2-135m", "bfloat16")
    model = load_teacher(source)
    found = extract((source, model), catalogue, tmp_path, count=200, layers="15", templates=TEMPLATES[:1])
    rows = [vectors.concepts.index(concept) for concept in found.concepts]
    index = vectors.layer_index(15)
    mean = vectors.vectors[:, 0, index].astype(np.float64).mean(0)
    exact = vectors.vectors[rows, 0, index]
    assert centred_cosine(found.vectors[:, 0, 0], exact, mean).min() >= 0.9995
    alone = np.stack([plain(model, f"Tell me about {concept}", [-1])[15] for concept in found.concepts[:50]])
    assert centred_cosine(found.vectors[:50, 0, 0], alone, mean).min() >= 0.9995


@pytest.mark.system
def test_short_types_give_nearly_the_same_vectors(tiny_folder, tmp_path):
    for architecture, dtype in itertools.product(ARCHITECTURES, ["bfloat16", "float16"]):
        exact = extract(load(tiny_folder(architecture)), FEW, tmp_path)
        short = extract(load(tiny_folder(architecture), dtype), FEW, tmp_path)
        assert short.dtype == dtype
        error = np.linalg.norm(short.vectors - exact.vectors, axis=-1) / np.linalg.norm(exact.vectors, axis=-1)
        assert error.max() < 0.03, (architecture, dtype)


def test_a_prompt_longer_than_the_context_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="the teacher takes 64"):
        extract(load(tiny_folder("gpt2")), FEW, tmp_path, templates=["{concept} " + "and so on " * 20])


EXTRACTIONS = """
import sys
from pathlib import Path
from pipeline.data.concepts import read_catalogue
from pipeline.storage import Output
from pipeline.extraction.parts import PartPlan, merge, read_parts
from pipeline.extraction.request import make_request
from pipeline.teachers.load import load_teacher
from pipeline.teachers.find import find_teacher
from processes import each_line

def extract(output):
    source = find_teacher(sys.argv[1])
    request = make_request(source, read_catalogue("wordfreq:en:8000"), layers="all", templates=["The {concept}"])
    plan = PartPlan.open(Output(Path(output)), request, 32, 40, 128)
    read_parts(load_teacher(source), request, plan, plan.missing())
    merge(request, plan)

each_line(extract)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.system)])
def test_a_run_that_is_killed_again_and_again_leaves_the_same_file(tiny_folder, tmp_path, kills):
    server = processes.start(EXTRACTIONS, tiny_folder("qwen3"))

    def begin(name):
        print(tmp_path / name, file=server.stdin, flush=True)
        return int(server.stdout.readline())

    def parts():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed*parts*/part-*.safetensors")}

    begin("whole.safetensors")
    start = time.monotonic()
    assert server.stdout.readline() == "0\n"
    moments, held, long = random.Random(0), {}, time.monotonic() - start
    for kill in range(kills):
        process, moment = begin("killed.safetensors"), time.monotonic() + moments.uniform(0, long)
        while time.monotonic() < moment and len(parts()) < 3 * kill + 3:  # of 40
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert server.stdout.readline() == f"{-signal.SIGKILL}\n"
        assert not (tmp_path / "killed.safetensors").exists()
        assert held.items() <= parts().items()  # nothing is read twice
        held = parts()
    assert held
    begin("killed.safetensors")
    server.stdin.close()
    assert server.stdout.readline() == "0\n"
    assert server.wait() == 0
    assert tmp_path.joinpath("killed.safetensors").read_bytes() == tmp_path.joinpath("whole.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"killed.safetensors", "whole.safetensors"}


# A process of its own: what earlier tests have freed would count as room below the limit.
LIMITED = """
import logging, os, resource, sys
from pathlib import Path
import numpy as np
from pipeline.data.concepts import read_catalogue
from test_reader import CATALOGUE, Catalogue, extract, load

logging.basicConfig(level=logging.WARNING)
tiny, words = load(sys.argv[1]), read_catalogue(str(CATALOGUE))
words = Catalogue(words.concepts[:1200], words.categories[:1200])
template = "one two three four five six seven eight nine ten {concept} " + "and so on " * 10
expected = extract(tiny, words, Path.cwd(), layers="4", templates=[template], batch_tokens=512)
used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000, resource.RLIM_INFINITY))
found = extract(tiny, words, Path.cwd(), layers="4", templates=[template], batch_tokens=1 << 20)
np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-2)
"""


@pytest.mark.system
def test_when_memory_runs_out_batches_are_halved(tiny_folder, tmp_path):
    """A real limit on a process's memory, which the big batch does not fit in and a smaller one does."""
    tests = [str(ROOT / "tests"), str(ROOT / "tests" / "extraction"), os.environ["PYTHONPATH"]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(tests)}
    command = [sys.executable, "-c", LIMITED, str(tiny_folder("qwen3"))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out of memory: going on with" in done.stderr


def test_shards_and_one_run_give_the_same_vectors(tiny_folder, catalogue, tmp_path):
    gpt2 = load(tiny_folder("gpt2"))
    one = extract(gpt2, catalogue, tmp_path, count=101, layers="2")
    four = extract(gpt2, catalogue, tmp_path, count=101, layers="2", workers=4)
    assert one.concepts == four.concepts
    assert one.extraction_key == four.extraction_key
    np.testing.assert_allclose(one.vectors, four.vectors, atol=4e-3)
    np.testing.assert_array_equal(one.token_ids, four.token_ids)


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_all_files_of_an_extraction_have_the_mode_that_the_user_s_files_have(tiny_folder, workplace, run, umask):
    options = ("--concepts", CATALOGUE, "--num-concepts", 30, "--output", "out/v.safetensors")
    before = os.umask(umask)
    try:
        code, _, err = run("extract", "--teacher", tiny_folder("gpt2"), *options)
    finally:
        os.umask(before)
    assert code == 0, err
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("out").rglob("*") if path.is_file()}
    assert {"v.safetensors", "v.vocabulary.safetensors"} <= set(modes)
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_merge_without_all_parts_says_so(tiny_folder, tmp_path):
    source, model = load(tiny_folder("gpt2"))
    request = make_request(source, FEW, layers="2", templates=TEMPLATES)
    plan = PartPlan.open(Output(tmp_path / "out.safetensors"), request, 32, 2, 64)
    read_parts(model, request, plan, plan.missing(Worker(1, 2)))
    with pytest.raises(WorkError, match="1 of 2 parts"):
        merge(request, plan)


def test_a_worker_that_comes_after_the_merge_finds_the_file(tiny_folder, tmp_path):
    source, model = load(tiny_folder("gpt2"))
    request = make_request(source, FEW, layers="2", templates=TEMPLATES)
    output = tmp_path / "out.safetensors"
    first, second = (PartPlan.open(Output(output), request, 32, 2, 64) for _ in range(2))
    for plan, worker in ((first, Worker(0, 2)), (second, Worker(1, 2))):
        read_parts(model, request, plan, plan.missing(worker))
    assert not second.is_merged
    merge(request, first)
    written = output.stat().st_mtime_ns
    assert second.is_merged
    assert merge(request, second) == []
    assert output.stat().st_mtime_ns == written


def test_the_key_names_all_that_decides_the_vectors(tiny_folder, tmp_path):
    source = find_teacher(str(tiny_folder("gpt2")))
    asked = {"layers": "2", "templates": TEMPLATES, "pool": "last"}
    request = make_request(source, FEW, **asked)
    assert request.key == make_request(replace(source, name="another name"), FEW, **asked).key
    pooled = replace(FEW, sources=(Source("a.csv", 5), Source("b.txt", len(FEW) - 5)), judge="a.csv")
    renamed = replace(pooled, sources=(Source("c.csv", 5), Source("d.txt", len(FEW) - 5)), judge="c.csv")
    assert make_request(source, pooled, **asked).key == make_request(source, renamed, **asked).key
    others = [
        make_request(source, FEW, **{**asked, "layers": "3"}),
        make_request(source, FEW, **{**asked, "templates": TEMPLATES[:2]}),
        make_request(source, FEW, **{**asked, "pool": "mean"}),
        make_request(source, FEW, **asked, count=5),
        make_request(replace(source, revision="other"), FEW, **asked),
        make_request(replace(source, dtype="bfloat16"), FEW, **asked),
        *(make_request(source, replace(pooled, judge=judge), **asked) for judge in ("a.csv", "")),
    ]
    assert len({request.key, *(other.key for other in others)}) == 9
    output = Output(tmp_path / "none.safetensors")
    assert not is_extracted(output, request, read_output_header(output))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("mid", (15,)), ("8,15", (8, 15)), ("8,mid", (8, 15)), ("15,8,8", (8, 15)), ("0,30", (0, 30))],
)
def test_layers_are_read_from_text(text, expected):
    assert parse_layers(text, 30) == expected
    assert parse_layers("all", 2) == (0, 1, 2)


@pytest.mark.parametrize("text", ["31", "-1", "middle", "8,,15", ""])
def test_layers_that_do_not_exist_are_refused(text):
    with pytest.raises(InputError, match="--layers"):
        parse_layers(text, 30)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("qwen4", "available: .*qwen3-1.7b"),
        ("missing.gguf", "no such file"),
        ("owner/model", "cannot load"),
    ],
)
def test_a_teacher_that_does_not_exist_is_refused_with_advice(name, complaint):
    with pytest.raises(InputError, match=complaint):
        find_teacher(name)


def test_an_empty_folder_is_no_teacher(tmp_path):
    with pytest.raises(InputError, match="not a saved model"):
        find_teacher(str(tmp_path))
