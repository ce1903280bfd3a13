"""Every family of models as a tiny random one: how far our vectors are from those of its plain forward pass.

    python tests/families.py [FAMILY ...]            prints a line for each
    python tests/families.py > docs/families.md      writes the table of the documentation
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import CATALOGUE, _tokenizer
from safetensors.numpy import load_file
from tinymodels import FAMILIES, Family
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import extraction
from pipeline.concepts import Catalogue, read_catalogue
from pipeline.errors import InputError, WorkError
from pipeline.loading import load_teacher
from pipeline.forward import tree_residuals
from pipeline.plan import Plan
from pipeline.request import make_request
from pipeline.storage import Output
from pipeline.teachers import find_teacher

# One token and many, the same beginnings and other ones, longer than the sliding windows of the tiny models.
CONCEPTS = (
    "ice", "ice cream", "a", "volcano", "slow cooking", "theory of general relativity",
    "the theory of the evolution of species by means of natural selection", "down-to-earth",
)  # fmt: skip
TEMPLATES = ("Tell me about {concept}", "{concept}")
EXACT = 1e-4  # rounding of float32 in a few blocks stays far below, and a wrong mask or position far above
SINGLE = 6  # of the tokens that are read by themselves, each so many-th is compared
SLACK = 1.5  # how much farther from float32 than the plain pass in bfloat16 ours may be


@dataclass
class Reading:
    """What a precision gives: the largest relative error of ours and of the plain pass, or the line of a refusal."""

    ours: float = np.nan
    plain: float = 0.0
    typical: tuple[float, float] = (0.0, 0.0)  # of both, the median over prompts of the worst block
    routed: bool = False
    refused: str = ""
    failed: str = ""
    whole: bool = False  # prompts did not share what they begin with

    def verdict(self) -> str:
        if self.refused:
            return "refused"
        if self.failed:
            return "traceback"
        near = self.ours <= max(EXACT, SLACK * self.plain)
        if self.plain and self.routed:  # rounding sends a token to another expert now and then, in either pass
            near = np.isfinite(self.ours)
        return "right" if near and self.typical[0] <= max(EXACT, SLACK * self.typical[1]) else "wrong"


@dataclass
class Finding:
    family: Family
    readings: dict[str, Reading] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        order = ["traceback", "wrong", "right", "refused"]
        return min((reading.verdict() for reading in self.readings.values()), key=order.index)


@cache
def tokenizer() -> Any:
    return _tokenizer(read_catalogue(str(CATALOGUE)).concepts, begin=True)


# --- the independent plain pass


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


@contextmanager
def watching(modules: dict[Any, nn.Module]) -> Iterator[dict[Any, list[tuple[Any, Any]]]]:
    """Each call of these modules: what it was given and what it returned."""
    calls: dict[Any, list[tuple[Any, Any]]] = {}

    def hook(key: Any) -> Callable[..., None]:
        def keep(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            calls.setdefault(key, []).append((given, _first(output)))

        return keep

    hooks = [module.register_forward_hook(hook(key), with_kwargs=True) for key, module in modules.items()]
    try:
        yield calls
    finally:
        for one in hooks:
            one.remove()


def hidden_states(model: Any, ids: list[int]) -> list[torch.Tensor]:
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    states = getattr(output, "hidden_states", None)
    return [state for state in states or () if isinstance(state, torch.Tensor)]


def find_blocks(model: Any, ids: list[int]) -> str:
    """The name of the list whose members gave the hidden states that the library itself names; "" if none did."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members = {(name, number): one for name, many in lists.items() for number, one in enumerate(many)}
    with watching(members) as calls, torch.inference_mode():
        states = hidden_states(model, ids)

    def is_state(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and any(
            value.shape == state.shape and torch.equal(value, state) for state in states
        )

    def fits(name: str) -> bool:
        ran = [calls.get((name, number)) for number in range(len(lists[name]))]
        return all(ran) and len(ran) > 1 and all(is_state(one[-1][1]) for one in ran[:-1])

    return max((name for name in lists if fits(name)), key=lambda name: len(lists[name]), default="")


def plain_streams(model: Any, blocks: str, prompts: list[list[int]], layers: tuple[int, ...]) -> np.ndarray:
    """The residual stream at the last token of each prompt, one prompt at a time, ``[prompts, layers, d_model]``."""
    modules = dict(enumerate(model.get_submodule(blocks)))
    read = []
    for ids in prompts:
        with watching(modules) as calls, torch.inference_mode():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        streams = [calls[0][0][0], *(calls[number][-1][1] for number in range(len(modules)))]
        read.append(torch.stack([streams[layer][0, -1].float() for layer in layers]))
    return torch.stack(read).numpy().astype(np.float64)


def is_causal(model: Any, blocks: str, ids: list[int]) -> bool:
    """Whether no position sees the one behind it."""
    modules = dict(enumerate(model.get_submodule(blocks)))
    seen = []
    for last in (ids[-1], ids[-1] - 1):
        with watching(modules) as calls, torch.inference_mode():
            model(input_ids=torch.tensor([[*ids[:-1], last]]), use_cache=False)
        seen.append(calls[len(modules) - 1][-1][1][0, :-1].float())
    return bool((seen[0] - seen[1]).norm() / seen[0].norm() < EXACT)


# --- ours


class _Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def extracted(teacher: str, dtype: str, place: Path) -> tuple[np.ndarray, np.ndarray, list[int], tuple[int, ...], bool]:
    """Our vectors ``[concepts, templates, layers, d_model]`` and those of single tokens, as extraction writes them."""
    told, trees = _Told(), []

    def counted(*given: Any) -> Any:
        trees.append(given)
        return tree_residuals(*given)

    log = logging.getLogger("pipeline")
    log.addHandler(told)
    try:
        source = find_teacher(teacher, dtype)
        model = load_teacher(source)
        catalogue = Catalogue(CONCEPTS, ("any",) * len(CONCEPTS))
        request = make_request(
            source, catalogue, layers=f"0,mid,{source.depth}", templates=TEMPLATES, token_block=1
        )
        output = Output(place / f"vectors-{dtype}.safetensors")
        plan = Plan.open(output, request, model.d_model, 1, 64)
        extraction.tree_residuals = counted
        extraction.read_parts(model, request, plan, plan.missing())
        [part] = [load_file(part.path) for part in plan.parts]
    finally:
        log.removeHandler(told)
        extraction.tree_residuals = tree_residuals
    whole = not trees or any("runs whole" in line for line in told.lines)
    return part["vectors"], part["token_activations"], list(part["token_vocab"]), request.layers, whole


# --- both


def relative(ours: np.ndarray, true: np.ndarray, over: Any = np.max) -> float:
    """The relative error of vectors ``[prompts, ..., d_model]``: the largest, or of the worst block ``over`` prompts."""
    error = np.linalg.norm(ours - true, axis=-1) / np.linalg.norm(true, axis=-1)
    return float(over(error, axis=0).max()) if np.isfinite(error).all() else np.inf


def examine(family: Family, place: Path) -> Finding:
    """Save the family's tiny model, read it our way in both precisions, and compare."""
    finding = Finding(family)
    teacher, plain_folder = family.save(place, tokenizer())
    load = family.load or AutoModelForCausalLM.from_pretrained
    truth: dict[str, Any] = {}
    try:
        truth = _truth(load, plain_folder, teacher, family, finding)
    except Exception as error:  # noqa: BLE001 (the plain pass of a model that is no causal one)
        finding.notes.append(f"plain pass: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
    for dtype in ("float32", "bfloat16"):
        reading = finding.readings[dtype] = Reading()
        try:
            vectors, alone, tokens, layers, reading.whole = extracted(str(teacher), dtype, place)
        except (InputError, WorkError) as error:
            reading.refused = str(error).replace(str(place), "").replace(f"--teacher {Path(teacher).name}: ", "")
            continue
        except Exception as error:  # noqa: BLE001 (a finding)
            reading.failed = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"
            finding.notes.append(traceback.format_exc(limit=-3))
            continue
        if not truth.get("causal"):
            reading.ours = np.inf
            continue
        if truth["layers"] != layers:
            finding.notes.append(f"layers {layers} read, {truth['layers']} expected")
            reading.ours = np.inf
            continue
        ours = np.concatenate([vectors.transpose(1, 0, 2, 3).reshape(-1, *vectors.shape[2:])])
        true = truth["float32"]
        if ours.shape != true.shape:
            finding.notes.append(f"shape {ours.shape} read, {true.shape} expected")
            reading.ours = np.inf
            continue
        reading.ours = relative(ours, true)
        reading.plain = relative(truth[dtype], true)
        by_layer = [relative(ours[:, n], true[:, n]) for n in range(len(layers))]
        single = truth["alone"](tuple(map(int, tokens[::SINGLE])))
        by_layer.append(relative(alone[::SINGLE], single["float32"]))
        reading.ours = max(by_layer)
        reading.typical = (relative(ours, true, np.median), relative(truth[dtype], true, np.median))
        reading.routed = truth["routed"]
        reading.plain = max(reading.plain, relative(single[dtype], single["float32"]))
        if reading.verdict() == "wrong":
            finding.notes.append(f"{dtype} by layer {layers} and single tokens: {[f'{e:.1e}' for e in by_layer]}")
    return finding


def _truth(load: Any, folder: Path, teacher: Path, family: Family, finding: Finding) -> dict[str, Any]:
    named = {"gguf_file": teacher.name} if teacher.is_file() else {}  # whose tokenizer is its own matter
    names = AutoTokenizer.from_pretrained(teacher.parent if named else folder, **named)
    prompts = [names(template.replace("{concept}", c))["input_ids"] for template in TEMPLATES for c in CONCEPTS]
    longest = max(prompts, key=len)
    models = {dtype: load(folder, dtype=getattr(torch, dtype)).eval() for dtype in ("float32", "bfloat16")}
    exact = models["float32"]
    blocks = family.blocks or find_blocks(exact, longest)
    if not blocks:
        finding.notes.append("plain pass: no list of blocks gives the library's hidden states")
        return {}
    depth = len(exact.get_submodule(blocks))
    layers = tuple(sorted({0, depth // 2, depth}))
    truth: dict[str, Any] = {"causal": is_causal(exact, blocks, longest), "layers": layers}
    truth["routed"] = any("expert" in name or "router" in name for name, _ in exact.named_parameters())
    if not truth["causal"]:
        finding.notes.append("a position sees those behind it")
    for dtype, model in models.items():
        truth[dtype] = plain_streams(model, blocks, prompts, layers)
    # Guard: a model whose vectors do not depend on what stands before would be right with any mask.
    short = plain_streams(exact, blocks, [longest, longest[-1:]], layers)
    if relative(short[:1, -1], short[1:, -1]) < 100 * EXACT:
        finding.notes.append("GUARD: context hardly matters")
    before = names(TEMPLATES[0].split("{")[0].rstrip())["input_ids"]

    @cache
    def alone(tokens: tuple[int, ...]) -> dict[str, np.ndarray]:
        prompts = [[*before, token] for token in tokens]
        return {dtype: plain_streams(model, blocks, prompts, (1,))[:, 0] for dtype, model in models.items()}

    truth["alone"] = alone
    return truth


def line(finding: Finding) -> str:
    parts = [f"{finding.family.name}: {finding.verdict}"]
    for dtype, reading in finding.readings.items():
        if reading.refused or reading.failed:
            parts.append(f"{dtype} {reading.refused or reading.failed}")
        else:
            mode = "whole" if reading.whole else "shared"
            own, plain = reading.typical
            parts.append(f"{dtype} {reading.ours:.1e} (plain {reading.plain:.1e}; median {own:.1e} {plain:.1e}, {mode})")
    return " | ".join([*parts, *(note.replace("\n", " / ") for note in finding.notes)])


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    chosen = [name for name in FAMILIES if not sys.argv[1:] or any(re.fullmatch(one, name) for one in sys.argv[1:])]
    for name in chosen:
        signal.alarm(100)
        with tempfile.TemporaryDirectory() as place:
            try:
                print(line(examine(FAMILIES[name], Path(place))), flush=True)  # noqa: T201
            except (Exception, TimeoutError) as error:  # noqa: BLE001
                print(f"{name}: NOT BUILT {type(error).__name__} {str(error).strip()[:300]}", flush=True)  # noqa: T201
                if len(sys.argv) == 2:
                    traceback.print_exc()


if __name__ == "__main__":
    main()
