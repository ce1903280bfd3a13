"""Loading a teacher: its weights whole, its blocks found, its matrix products in the precision asked for."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError
from pipeline.teachers.files import check_loaded, silence_libraries, translate_load_errors
from pipeline.teachers.find import DTYPES, Teacher, TeacherSource
from pipeline.teachers.gguf import check_read, unpack_gguf
from pipeline.teachers.residuals import residuals
from pipeline.teachers.tokenizer import check_vocabulary, load_tokenizer

MATRIX_PRODUCTS = (nn.Linear, Conv1D)
PROBE = (3, 5, 7, 11)  # tokens that every vocabulary has

log = logging.getLogger(__name__)


def load_teacher(source: TeacherSource, device: torch.device | str = "cpu", device_map: str | None = None) -> Teacher:
    """Load a teacher's weights, with its matrix products in the source's precision.

    Args:
        source: what `find_teacher` found.
        device: where the model computes.
        device_map: spread the model over several devices instead: "auto", "balanced" or "sequential".

    Returns:
        The teacher.

    Raises:
        InputError: the weights cannot be read or reached, some are missing, or it is no causal language model.
    """
    return apply_precision(load_untouched(source, device, device_map))


def load_untouched(source: TeacherSource, device: torch.device | str = "cpu", device_map: str | None = None) -> Teacher:
    """Load a teacher without exchanging any arithmetic of the library; arguments and errors as of `load_teacher`."""
    location, own = source.location, dict(source.options)
    log.info("loading %s%s", source.name, _size(source.files))
    if source.is_packed:
        with translate_load_errors(source.name, location), silence_libraries(downloads=False):
            folder = unpack_gguf(source)
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
        options["dtype"] = torch.float32 if source.is_packed else DTYPES[source.dtype]
    if device_map:
        options["device_map"] = device_map
    with translate_load_errors(source.name, source.location), silence_libraries(downloads=not source.files):
        tokenizer = load_tokenizer(source.name, location, source.config, own)
        causal, found = _model_class(source).from_pretrained(
            location, config=source.config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_loaded(source.name, causal, found)
    if "gguf_file" in own:
        check_read(source.files[0], causal)
    model: Any = causal.base_model
    if "device_map" not in options:
        model.to(device)
    causal.eval().requires_grad_(False)
    with translate_load_errors(source.name, source.location):
        blocks = _find_blocks(model, source)
        teacher = Teacher(
            source.name, source.revision, model, tokenizer, blocks, source.d_model, source.dtype, causal,
            has_head=not found["missing_keys"],
        )  # fmt: skip
        if not source.is_tested:
            _check_causal(teacher)
    check_vocabulary(source.name, tokenizer, len(teacher.embedding_table))
    return teacher


def apply_precision(teacher: Teacher) -> Teacher:
    """Put a teacher's matrix products into its short type, where it has one and weights that allow it."""
    model: Any = teacher.model
    if teacher.dtype not in ("bfloat16", "float16") or not has_plain_weights(model):
        return teacher
    dtype = DTYPES[teacher.dtype]
    hooks = _shorten(model, dtype)
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([PROBE], device=teacher.device), use_cache=False)
    except RuntimeError:  # the model multiplies by weights without calling their modules
        for hook in hooks:
            hook.remove()
        model.to(dtype)
        return teacher
    head: Any = teacher.causal.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None:
        head.register_forward_pre_hook(lambda own, args: (args[0].to(own.weight), *args[1:]))
    return teacher


def has_plain_weights(model: nn.Module) -> bool:
    """Whether the weights of matrix products are floating-point numbers of 16 bits or more, not quantised."""
    weights = [module.weight for module in model.modules() if isinstance(module, MATRIX_PRODUCTS)]
    is_quantised = getattr(model.config, "quantization_config", None) or getattr(model, "hf_quantizer", None)
    return not is_quantised and all(
        type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2 for weight in weights
    )


def _shorten(model: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Hook matrix products to run in a short type, with the stream, norms and attention between them in float32."""
    # The products are nearly all of the arithmetic, and rounding the stream at every block is most of the error: on
    # SmolLM2-135M at block 15 the least centred cosine to float32 is 0.9997 so, and 0.9984 with all in bfloat16.
    # Models with weights in other modules (mixtures of experts) compute in the short type throughout.
    products = [module for module in model.modules() if isinstance(module, MATRIX_PRODUCTS)]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    matrices = {id(module.weight) for module in products}
    kept = matrices | {id(module.weight) for module in tables}  # a table has no arithmetic and keeps its type
    if any(parameter.dim() > 1 and id(parameter) not in kept for parameter in model.parameters()):
        model.to(dtype)
        return []
    for parameter in model.parameters():
        if id(parameter) in matrices:
            parameter.data = parameter.data.to(dtype)
        elif id(parameter) not in kept:
            parameter.data = parameter.data.float()
    hooks = []
    for product in products:
        if product.bias is not None:
            product.bias.data = product.bias.data.to(dtype)
        hooks.append(product.register_forward_pre_hook(lambda _module, args: (args[0].to(dtype), *args[1:])))
    for module in [*products, *tables]:
        hooks.append(module.register_forward_hook(lambda _module, _args, output: output.float()))
    return hooks


def _model_class(source: TeacherSource) -> Any:
    """The auto class that loads it: for causal language models, or for those that read images too."""
    kind, for_text, for_images = type(source.config), AutoModelForCausalLM, AutoModelForImageTextToText
    is_text = "auto_map" in source.config.to_dict() or kind in for_text._model_mapping
    return for_images if not is_text and kind in for_images._model_mapping else for_text


def _size(files: Sequence[Path]) -> str:
    total = sum(file.stat().st_size for file in files)
    return f" ({total / 1e9:.1f} GB)" if total > 1e9 else f" ({total / 1e6:.0f} MB)" if total else ""


def _find_blocks(model: Any, source: TeacherSource) -> Sequence[nn.Module]:
    """The transformer blocks, in order: the module list of the configured length that runs for tokens."""
    # A tower for images may be as deep as the text model.
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == source.depth]
    if len(lists) > 1:
        lists = [blocks for blocks in lists if _runs(model, blocks)]
    if not lists:
        raise InputError(f"--teacher {source.name}: cannot find its {source.depth} transformer blocks")
    return list(lists[0])


def _runs(model: Any, blocks: nn.ModuleList) -> bool:
    """Whether every module of a list runs for tokens, once."""
    calls: list[nn.Module] = []
    with ExitStack() as hooks, torch.inference_mode():
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda block, _args, _output: calls.append(block)))
        model(input_ids=torch.tensor([PROBE], device=next(model.parameters()).device), use_cache=False)
    return sorted(map(id, calls)) == sorted(map(id, blocks))


def _check_causal(teacher: Teacher) -> None:
    """Refuse a model whose residual stream at a token changes with the tokens behind it."""
    layers = range(len(teacher.blocks) + 1)
    other = torch.tensor([[*PROBE[:-1], PROBE[0]]])
    first, second = (residuals(teacher, ids, layers)[:, 0, :-1].float() for ids in (torch.tensor([PROBE]), other))
    change = (first - second).norm(dim=-1) / first.norm(dim=-1)
    if not (change < (1e-4 if teacher.dtype == "float32" else 0.05)).all():
        raise InputError(
            f"--teacher {teacher.name}: not a causal language model; its vector at a token changes with the tokens "
            "behind it"
        )
