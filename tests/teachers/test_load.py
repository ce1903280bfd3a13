"""Nothing is read through a weight that was not there, nor of a model that is not causal; all of it in one line."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import mlflow
import pytest
import tinygguf
import torch
from conftest import CATALOGUE
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nTextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    RecurrentGemmaConfig,
    XLNetConfig,
    XLNetLMHeadModel,
)

from pipeline.analysis.intervention import NextTokenDistributions
from pipeline.data.concepts import Catalogue
from pipeline.errors import InputError, WorkError
from pipeline.extraction.check import compare, in_float32, reference_vectors
from pipeline.extraction.reader import Reader, plain_vectors
from pipeline.extraction.request import make_request
from pipeline.teachers.find import find_teacher
from pipeline.teachers.load import load_teacher, load_untouched
from pipeline.teachers.prompts import tokenize

EXTRACT = ("extract", "--concepts", CATALOGUE, "--num-concepts", 40, "--no-vocabulary", "--output", "v.safetensors")
WORDS = ("volcano", "slow cooking", "a", "theory of general relativity", "down-to-earth", "ice", "ice cream", "sadness")
SIZES = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a tiny Llama that may be damaged."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


@pytest.fixture
def saved(tiny_folder, tmp_path):
    """Save a model of random weights, with a tokenizer: ``saved(model)`` gives its folder."""

    def save(model):
        folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / type(model).__name__))
        (folder / "model.safetensors").unlink()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        model.save_pretrained(folder)
        return folder

    torch.manual_seed(0)
    return save


def catalogue_of(words):
    return Catalogue(tuple(words), ("any",) * len(words))


def errors_of(folder, words=WORDS, dtype="float32", batch_tokens=256, before=()):
    """How far vectors of all blocks are from the plain pass, relative to their norm, the largest.

    Where there are words before, those are read first.
    """
    teacher = load_teacher(find_teacher(str(folder), dtype))
    layers = tuple(range(len(teacher.blocks) + 1))
    request = make_request(
        find_teacher(str(folder), dtype), catalogue_of(words), layers="all", templates=["Tell me about {concept}"]
    )
    prompts = tokenize(teacher, words, request.templates[0])
    reader = Reader(teacher, request, batch_tokens, lambda done: None)
    if before:
        reader.read([tokenize(teacher, before, request.templates[0])])
    values, _ = reader.read([prompts])
    alone = torch.stack([plain_vectors(teacher, prompt, layers, "last") for prompt in prompts])
    return float(((values[:, 0] - alone).norm(dim=-1) / alone.norm(dim=-1)).max())


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


DAMAGES = {
    "a block is missing": (
        lambda folder: change_weights(folder, lambda held: {k: v for k, v in held.items() if "layers.1." not in k}),
        "9 of 41 weights are not in its files .* the first model.layers.1",
    ),
    "names of a compiled model": (
        lambda folder: change_weights(folder, lambda held: {f"_orig_mod.{k}": v for k, v in held.items()}),
        "the mark of a compiled model: save model._orig_mod",
    ),
    "weights of another shape": (
        lambda folder: change_weights(folder, lambda held: {k: v[..., :16].clone() for k, v in held.items()}),
        r"do not fit its configuration, the first \S+ \(",
    ),
    "fewer blocks than the configuration says": (
        lambda folder: change_config(folder, num_hidden_layers=6),
        "the first model.layers.4",
    ),
    "cut short": (lambda folder: cut(folder / "model.safetensors", 20_000), "model.safetensors is not whole"),
    "empty": (lambda folder: cut(folder / "model.safetensors", 0), "model.safetensors is not whole"),
    "a pointer of Git LFS": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid\n"),
        "model.safetensors is a Git LFS pointer, not the weights; fetch them with: git lfs pull",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a shard is missing": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
            (folder / "model.safetensors.index.json").write_text(
                json.dumps(
                    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
                )
            ),
        ),
        "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names",
    ),
    "pickled weights that are text": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "pytorch_model.bin").write_text("<html>not found</html>"),
        ),
        "cannot load",
    ),
    "a configuration that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    "a configuration of an unknown model": (
        lambda folder: change_config(folder, model_type="never-heard-of"),
        "cannot load .*never-heard-of",
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "the folder holds an adapter .PEFT.; merge it",
    ),
}


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line_that_names_the_fault(workplace, run, folder, damage):
    make, line = DAMAGES[damage]
    make(folder)
    code, out, err = run(*EXTRACT, "--teacher", folder)
    assert code == 2, (out, err)
    assert "Traceback" not in err
    assert re.search(line, err), err
    assert not list(Path().glob("v.safetensors*"))


def test_one_of_several_gguf_files_is_refused_with_the_command_that_joins_them(workplace, run):
    Path("model-00001-of-00003.gguf").write_bytes(b"GGUF")
    code, _, err = run(*EXTRACT, "--teacher", "model-00001-of-00003.gguf")
    assert code == 2
    assert "one of 3 files of a model; join them first: llama-gguf-split --merge model-00001-of-00003.gguf" in err


def test_a_model_saved_without_its_head_is_read_and_not_asked_for_its_words(folder):
    change_weights(folder, lambda held: {k: v for k, v in held.items() if not k.startswith("lm_head")})
    assert errors_of(folder) < 1e-3
    teacher = load_teacher(find_teacher(str(folder)))
    with pytest.raises(InputError, match="no weights of a language-model head"):
        teacher.logits(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            lambda: BertForMaskedLM(BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48)),
            "an encoder",
        ),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
            ),
            "an encoder-decoder",
        ),
    ],
)
def test_what_is_no_causal_language_model_is_refused(saved, model, line):
    with pytest.raises(InputError, match=line):
        find_teacher(str(saved(model())))


def test_a_model_whose_tokens_see_those_behind_them_is_refused_whatever_its_name(saved):
    folder = saved(XLNetLMHeadModel(XLNetConfig(vocab_size=600, d_model=32, n_layer=4, n_head=4, d_inner=48)))
    with pytest.raises(InputError, match=r"(not a causal language model|no stream of prompts by tokens)"):
        load_teacher(find_teacher(str(folder)))


SINKS = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=2, sliding_window=4)
OWN_WAYS = {
    "attention sinks": SINKS,
    "embeddings narrower than the blocks": OPTConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "blocks that return lists": OpenAIGPTConfig(vocab_size=600, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    "blocks that keep a state": RecurrentGemmaConfig(
        **SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 1}, lru_width=32, attention_window_size=8
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_WAYS)
def test_blocks_with_something_of_their_own_give_the_plain_pass(saved, name):
    assert errors_of(saved(AutoModelForCausalLM.from_config(OWN_WAYS[name]))) < 1e-3


def test_sinks_take_their_share_of_attention_in_short_types_too(saved):
    folder = saved(AutoModelForCausalLM.from_config(SINKS))
    assert errors_of(folder, dtype="bfloat16") < 0.02


def test_the_blocks_of_the_text_are_found_beside_a_tower_of_the_same_depth(saved):
    text = Gemma3Config().text_config.__class__(**SIZES)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=599)
    folder = saved(Gemma3ForConditionalGeneration(config))
    teacher = load_teacher(find_teacher(str(folder)))
    assert list(teacher.blocks) == list(teacher.causal.model.language_model.layers)
    assert errors_of(folder) < 1e-3


def test_blocks_that_pass_on_several_streams_are_refused(saved, workplace, run):
    config = Gemma3nTextConfig(
        **SIZES, vocab_size_per_layer_input=600, hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    folder = saved(AutoModelForCausalLM.from_config(config))
    code, _, err = run(*EXTRACT, "--teacher", folder)
    assert code == 2
    assert re.search(r"error: --teacher \S+: block 0 passes on a tensor of shape .*, not one residual stream", err), err


def test_long_texts_run_whole_and_short_ones_beside_them_as_a_tree(tiny_folder):
    long = [" ".join(f"{word} {number}" for number in range(4)) for word in ("ice", "volcano", "sadness")]
    assert errors_of(tiny_folder("llama"), (*WORDS, *(f"{text} " * 9 for text in long))) < 1e-3


def test_rotary_positions_that_change_with_the_longest_prompt_are_those_of_each_prompt_alone(saved):
    """Beyond 12 tokens other factors hold; a tree of short and long prompts would have one of the two for all."""
    quarter = [1.0 + 0.5 * number for number in range(4)]
    rotary = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": quarter,
              "long_factor": [4 * factor for factor in quarter], "original_max_position_embeddings": 12}  # fmt: skip
    sizes = SIZES | {"max_position_embeddings": 64, "pad_token_id": 0}
    config = Phi3Config(**sizes, rope_parameters=rotary, original_max_position_embeddings=12)
    folder = saved(AutoModelForCausalLM.from_config(config))
    long = [f"{word} of a {word} and a {word}" for word in WORDS]
    assert errors_of(folder, (*long, *WORDS), before=("ice", "a", "sadness")) < 1e-3


def test_a_tree_is_compared_even_where_the_first_prompts_ran_whole(tiny_folder):
    """Long prompts that run one by one tell nothing about a tree."""
    source = find_teacher(str(tiny_folder("llama")))
    teacher = load_teacher(source)
    request = make_request(source, catalogue_of(WORDS), layers="2", templates=["{concept}"])
    reader = Reader(teacher, request, 256, lambda done: None)
    reader.read([tokenize(teacher, [f"{word} of the sea and the sun " * 20 for word in WORDS[:2]], "{concept}")])
    assert reader.uses_trees is None
    reader.read([tokenize(teacher, WORDS, "Tell me about {concept}")])
    assert reader.uses_trees


GGUF_LOSSES = {
    "biases that the library has no place for": ({"attention_bias": True}, {}, "weights that are not read"),
    "another rotary base": ({}, {"rope.freq_base": 5e5}, "rope.freq_base"),
    "another epsilon": ({}, {"attention.layer_norm_rms_epsilon": 1e-3}, "attention.layer_norm_rms_epsilon"),
}


@pytest.mark.parametrize("loss", GGUF_LOSSES)
def test_a_gguf_file_of_which_something_is_not_read_is_refused(tiny_folder, tmp_path, monkeypatch, loss):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))  # where GGUF files are unpacked
    options, unread, line = GGUF_LOSSES[loss]
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **options))
    path = tmp_path / "tiny.gguf"
    tinygguf.write(model, AutoTokenizer.from_pretrained(tiny_folder("llama")), path)
    source = find_teacher(str(path))
    text = source.config
    for key in unread:  # as if the library had passed over what the file says
        if key == "rope.freq_base":
            text.rope_parameters = text.rope_parameters | {"rope_theta": unread[key]}
        else:
            text.rms_norm_eps = unread[key]
    with pytest.raises(InputError, match=line):
        load_teacher(source)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def checked_runs():
    return [run for run in mlflow.search_runs(search_all_experiments=True, output_format="list")
            if "check_error" in run.data.metrics]  # fmt: skip


def test_a_few_prompts_are_compared_with_the_untouched_model_before_an_extraction(workplace, run, folder):
    code, _, err = run(*EXTRACT, "--teacher", folder, "--check", "--dtype", "bfloat16", "--layers", "2,4")
    assert code == 0, err
    [found] = checked_runs()
    assert 0 < found.data.metrics["check_error"] < 0.02
    written = mlflow.artifacts.download_artifacts(run_id=found.info.run_id, artifact_path="manifest.json")
    manifest = json.loads(Path(written).read_text())
    assert manifest["check"]["prompts"] == 8
    assert set(manifest["check"]["error_by_block"]) == {"2", "4"}


def test_models_that_are_not_tested_are_checked_unasked(workplace, run, folder, tmp_path):
    untested = shutil.copytree(folder, tmp_path / "with-code-of-its-own")
    config = json.loads((untested / "config.json").read_text())
    code_of_its_own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (untested / "config.json").write_text(json.dumps(config | code_of_its_own))
    for number, (model, option) in enumerate([(folder, "auto"), (untested, "auto"), (untested, "off")]):
        code, _, err = run(*EXTRACT, "--teacher", model, "--output", f"{number}.safetensors", "--check", option)
        assert code == 0, err
        assert len(checked_runs()) == (number > 0)
    code, _, err = run(*EXTRACT, "--teacher", folder, "--check", "perhaps")
    assert (code, "unknown check 'perhaps'; available: auto, off, on" in err) == (2, True)


def test_vectors_far_from_the_untouched_model_end_the_extraction(folder):
    source = find_teacher(str(folder), "bfloat16")
    untouched = load_untouched(source)
    request = make_request(source, catalogue_of(WORDS), layers="2,3", templates=["Tell me about {concept}"])
    expected = reference_vectors(untouched, request)
    with torch.no_grad():
        untouched.blocks[2].mlp.down_proj.weight.add_(0.02)
    with pytest.raises(WorkError, match=r"after block 3 vectors are \S+ of their norm from the model's own pass"):
        compare(untouched, request, expected)


def test_one_module_at_a_time_is_in_float32_and_all_are_as_before_afterwards(tiny_folder):
    folder = str(tiny_folder("llama"))
    exact, short = (load_untouched(find_teacher(folder, dtype)) for dtype in ("float32", "bfloat16"))
    before = {name: value.clone() for name, value in short.model.state_dict().items()}
    for name, parameter in exact.model.named_parameters():
        parameter.data = before[name].float()
    [prompt] = tokenize(short, ["slow cooking"], "Tell me about {concept}")
    with in_float32(short.model):
        found = plain_vectors(short, prompt, (2, 4), "last")
    torch.testing.assert_close(found, plain_vectors(exact, prompt, (2, 4), "last"), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in short.model.state_dict().items())
    assert {value.dtype for value in short.model.parameters()} == {torch.bfloat16}


def test_libraries_are_quiet_unless_asked(workplace, run, folder):
    for options, is_shown in (((), False), (("--verbose",), True)):
        code, _, err = run(*EXTRACT, "--teacher", folder, "--overwrite", *options)
        assert code == 0, err
        assert ("Loading weights" in err) == is_shown, err
        Path("v.safetensors").unlink()


OWN_HEADS = {
    "logits multiplied": CohereConfig(**SIZES, logit_scale=0.3),
    "logits divided": GraniteConfig(**SIZES, logits_scaling=4.0, residual_multiplier=0.7),
    "logits bounded": Gemma2Config(**SIZES, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("name", OWN_HEADS)
def test_next_tokens_are_as_the_models_own_head_has_them(saved, name):
    folder = saved(AutoModelForCausalLM.from_config(OWN_HEADS[name]))
    teacher = load_teacher(find_teacher(str(folder)))
    found = NextTokenDistributions(teacher, WORDS, "Tell me about {concept}", 2).true
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, own in zip(tokenize(teacher, WORDS, "Tell me about {concept}"), found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt.token_ids])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def damaged(folder, draw):
    """Damage a folder at random; what was done."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    path = draw.choice(files)
    kind = draw.choice(["removed", "cut", "bytes changed", "renamed", "swapped", "emptied", "a value changed"])
    content = path.read_bytes()
    if kind == "removed":
        path.unlink()
    elif kind == "renamed":
        path.rename(
            path.with_name(draw.choice(["weights.bin", "pytorch_model.bin", "other.json", f"{path.name}.part"]))
        )
    elif kind == "swapped":
        path.write_bytes(draw.choice(files).read_bytes())
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "bytes changed":
        changed = bytearray(content)
        for _ in range(draw.randrange(1, 6)):  # at the front, where headers are
            changed[draw.randrange(min(len(changed), 3000))] = draw.randrange(256)
        path.write_bytes(changed)
    else:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        name = draw.choice(sorted(values))
        values[name] = draw.choice([None, -1, 0, 1, 3, 7, 64, 1e9, "text", [], {}, True, False])
        path.write_text(json.dumps(values))
        kind = f"{name} = {values[name]!r}"
    return f"{path.name} {kind}"


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ", "24"))))
def test_a_folder_damaged_at_random_is_exact_or_refused_in_one_line(tiny_folder, tmp_path, seed):
    draw = random.Random(seed)
    folder = Path(shutil.copytree(tiny_folder(draw.choice(["llama", "gpt2", "gemma3"])), tmp_path / "model"))
    what = damaged(folder, draw)
    try:
        error = errors_of(folder)
    except (InputError, WorkError):
        return
    assert error < 1e-3, what
    # What was read is what the library reads of the same files.
    teacher = load_teacher(find_teacher(str(folder)))
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not found["missing_keys"], what
    [prompt] = tokenize(teacher, ["slow cooking"], "Tell me about {concept}")
    with torch.no_grad():
        expected = model(torch.tensor([prompt.token_ids]), output_hidden_states=True).hidden_states[1][0, -1]
    torch.testing.assert_close(plain_vectors(teacher, prompt, (1,), "last")[0], expected, rtol=1e-4, atol=1e-4)
