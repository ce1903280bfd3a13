"""Every family of models as a tiny random one: how far our vectors are from those of its plain forward pass.

``python tests/families.py NAME ...`` tells of each family whose name fits a pattern, in a line; without names it writes
the page of the documentation.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import CATALOGUE, _tokenizer
from familylist import FAMILIES, Family
from plainpass import Plain, blocks_of
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from pipeline.data.concepts import Catalogue, read_catalogue
from pipeline.errors import InputError, WorkError
from pipeline.extraction import reader
from pipeline.extraction.parts import PartPlan, read_parts
from pipeline.extraction.request import make_request
from pipeline.storage import Output
from pipeline.teachers.find import find_teacher
from pipeline.teachers.load import load_teacher
from pipeline.teachers.residuals import tree_residuals

# One token and many, the same beginnings and other ones, longer than the sliding windows of the tiny models.
CONCEPTS = (
    "ice", "ice cream", "a", "volcano", "slow cooking", "theory of general relativity",
    "the theory of the evolution of species by means of natural selection", "down-to-earth",
)  # fmt: skip
TEMPLATES = ("Tell me about {concept}", "{concept}")
SINGLE = 8  # of the tokens that are read by themselves, each so many-th is compared
EXACT = 1e-4  # rounding of float32 in a few blocks stays far below, and a wrong mask or position far above
SLACK = 2.0  # how much farther from float32 than the plain pass in a short type ours may be
SHORT = 0.05  # how far from float32 where the plain pass in a short type fails
LONGEST = 220  # characters of a refusal in the table
TINY = 1e-8
COLUMNS = ("family", "class", "special", "shared", "float32", "bfloat16")
INTRODUCTION = """# Families of models

`make families` writes this page, and the tests compare a quarter of the families, of every kind, with it. Of each
they make a tiny random model, read it as `extract` reads a teacher, and compare the vectors with those of the
untouched model of transformers
{version}, which runs one prompt at a time: at the embeddings, halfway and after the last block, for short and long
prompts and for single tokens. Of {total} families {right} are read and {refused} are refused.

- **family**: the `model_type` of the model's `config.json`, and what is different in that row. *With images*: a model
  that reads images too, of which the text model is read. *Whole*: an encoder-decoder as it is published. *GGUF*: a file
  of that family, compared with a folder of the same weights.
- **shared**: whether what prompts begin with in common runs once. Where it does not, each prompt runs whole.
- **float32**: the largest distance of our vectors from the model's own, relative to their norm, as the nearest power of
  ten.
- **bfloat16**: the same of the median prompt, and of the farthest where that is another power of ten: in mixtures of
  experts rounding sends a token to another expert now and then. Both are distances from the float32 pass, and the
  model's own bfloat16 pass is as far from it. The row of `--dtype int8` has that precision here; the figures of *8-bit
  weights* are distances from the model before it was packed.
- **refused**: the line with which the command ends, before anything is extracted.

Tiny models tell whether a family is read rightly, not how much larger ones lose in bfloat16: `extract --check` tells
that of the teacher itself.
"""
MATTERS = 0.01  # how much what stands before a token must change its vector, for the model to tell right from wrong


@dataclass
class TokenFeatures:
    """What a precision gives: errors relative to a vector's norm, or why there are none.

    Attributes:
        largest: ours, of all prompts and blocks, and the plain pass's.
        typical: the same, of the median prompt and the worst block.
        is_routed: whether rounding may send a token to another expert, in either pass.
        is_whole: whether each prompt ran by itself.
        refused: the line.
        failed: the error that is no line.
    """

    largest: tuple[float, float] = (math.nan, 0.0)
    typical: tuple[float, float] = (math.nan, 0.0)
    is_routed: bool = False
    is_whole: bool = False
    refused: str = ""
    failed: str = ""

    @property
    def verdict(self) -> str:
        """Right, refused, wrong, or fails."""
        if self.refused or self.failed:
            return "refused" if self.refused else "fails"
        if not math.isfinite(self.largest[0]):
            return "wrong"
        if math.isnan(self.typical[1]):
            return "right" if self.typical[0] <= SHORT else "wrong"
        pairs = [self.typical] if self.is_routed and self.largest[1] else [self.typical, self.largest]
        return "right" if all(ours <= max(EXACT, SLACK * plain) for ours, plain in pairs) else "wrong"


@dataclass
class Finding:
    """A family's readings by precision, with what was noticed."""

    family: Family
    class_name: str = ""
    special: str = ""
    readings: dict[str, TokenFeatures] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The worst of its readings'."""
        worst = ["fails", "wrong", "right", "refused"]
        return min((reading.verdict for reading in self.readings.values()), key=worst.index)


@cache
def tokenizer() -> Any:
    return _tokenizer(read_catalogue(str(CATALOGUE)).concepts, begin=True)


@dataclass(frozen=True)
class Vectors:
    """Vectors of the prompts ``[prompts, layers, d_model]``, and of single tokens ``[tokens, 1, d_model]``."""

    prompts: np.ndarray
    alone: np.ndarray

    def errors_from(self, true: Vectors, over: Any = np.max) -> float:
        """The relative error, of the worst block, ``over`` prompts (each single token is one)."""
        return max(
            float(over(np.linalg.norm(ours - plain, axis=-1) / np.linalg.norm(plain, axis=-1), axis=0).max())
            for ours, plain in ((self.prompts, true.prompts), (self.alone, true.alone))
        )


def examine(family: Family, place: Path) -> Finding:
    """Save a family's tiny model, read it as an extraction does in both precisions, and compare with its plain pass."""
    finding = Finding(family, special=family.special)
    teacher, folder = family.save(place, tokenizer())
    with suppress(Exception):
        finding.class_name = AutoConfig.from_pretrained(folder).architectures[0]
    plain = _PlainPass(family, teacher, folder, finding)
    for dtype in family.dtypes:
        reading = finding.readings[dtype] = TokenFeatures()
        try:
            ours, layers, tokens, reading.is_whole = _extracted(str(teacher), dtype, place)
        except (InputError, WorkError) as error:
            reading.refused = _brief(str(error), teacher, place)
            continue
        except Exception as error:
            reading.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            finding.notes.append(" / ".join(traceback.format_exc(limit=-3).splitlines()))
            continue
        if (found := plain.vectors(dtype, layers, tokens)) is None:
            finding.notes.append(f"{dtype}: vectors, where the plain pass gives none")
            continue
        shorter, exact = found
        if ours.prompts.shape != exact.prompts.shape:
            finding.notes.append(f"{dtype}: {ours.prompts.shape} read, {exact.prompts.shape} expected")
            continue
        reading.is_routed = plain.is_routed
        reading.largest = ours.errors_from(exact), math.nan if shorter is None else shorter.errors_from(exact)
        reading.typical = (
            ours.errors_from(exact, np.median),
            math.nan if shorter is None else shorter.errors_from(exact, np.median),
        )
    return finding


class _PlainPass:
    """The plain pass of a family's tiny model in float32 and in the other precision, as far as the library runs it."""

    def __init__(self, family: Family, teacher: Path, folder: Path, finding: Finding) -> None:
        named = {"gguf_file": teacher.name} if teacher.is_file() else {}
        self.family, self.teacher, self.folder, self.finding = family, teacher, folder, finding
        self.models: dict[str, Plain | None] = {}
        self.is_routed = False
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(teacher.parent if named else folder, **named)
            self.prompts = [self._ids(template, concept) for template in TEMPLATES for concept in CONCEPTS]
            longest = max(self.prompts, key=len)
            exact = self._load("float32", folder)
            finding.special = "; ".join(filter(None, [finding.special, *traits(exact)]))
            self.is_routed = any("expert" in name or "router" in name for name, _ in exact.named_parameters())
            whole = Plain(exact, blocks_of(exact, longest))
            if not whole.is_causal(longest):
                finding.notes.append("plain pass: a token sees those behind it")
                return
            self.models["float32"] = whole
            self._check_that_context_matters(whole, longest)
        except Exception as error:
            finding.notes.append(f"plain pass: {type(error).__name__}: {' '.join(str(error).split())[:150]}")

    def vectors(
        self, dtype: str, layers: Sequence[int], tokens: Sequence[int]
    ) -> tuple[Vectors | None, Vectors] | None:
        """Those of the precision, None where the library itself fails in it, and those in float32; None without any."""
        exact = self.models.get("float32")
        if exact is None or layers[-1] != exact.depth:
            return None
        before = self._ids(TEMPLATES[0].partition("{")[0].rstrip())
        alone = [[*before, int(token)] for token in tokens]

        def read(plain: Plain) -> Vectors:
            return Vectors(plain.streams(self.prompts, layers), plain.streams(alone, [1]))

        true = read(exact)
        if dtype == "float32" and not self.family.is_packed:
            return true, true
        try:
            source = self.teacher if self.family.is_packed else self.folder
            return read(Plain(self._load(dtype, source), exact.blocks)), true
        except Exception as error:
            self.finding.notes.append(f"plain pass in {dtype}: {type(error).__name__}")
            return None, true

    def _load(self, dtype: str, folder: Path) -> Any:
        eight_bits = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        options = eight_bits if dtype == "int8" else {"dtype": getattr(torch, dtype)}
        return self.family.auto.from_pretrained(folder, **options).eval()

    def _ids(self, template: str, concept: str = "") -> list[int]:
        return list(self.tokenizer(template.replace("{concept}", concept))["input_ids"])

    def _check_that_context_matters(self, plain: Plain, ids: Sequence[int]) -> None:
        vectors = plain.streams([ids, ids[-1:]], [plain.depth])[:, 0]
        if np.linalg.norm(vectors[0] - vectors[1]) < MATTERS * np.linalg.norm(vectors[0]):
            self.finding.notes.append("plain pass: what stands before a token hardly matters, so this tests little")


def _extracted(teacher: str, dtype: str, place: Path) -> tuple[Vectors, tuple[int, ...], list[int], bool]:
    """Our vectors as an extraction writes them, their blocks, the single tokens, and whether all prompts ran whole."""
    log_lines = _LogLines()
    trees: list[object] = []

    def counted(*given: Any) -> Any:
        trees.append(given)
        return tree_residuals(*given)

    log = logging.getLogger("pipeline")
    log.addHandler(log_lines)
    reader.tree_residuals = counted
    try:
        source = find_teacher(teacher, dtype)
        model = load_teacher(source)
        catalogue = Catalogue(CONCEPTS, ("any",) * len(CONCEPTS))
        request = make_request(source, catalogue, layers=f"0,mid,{source.depth}", templates=TEMPLATES, token_block=1)
        plan = PartPlan.open(Output(place / f"{dtype}.safetensors"), request, model.d_model, 1, 64)
        read_parts(model, request, plan, plan.missing())
        [part] = [load_file(part.path) for part in plan.parts]
    finally:
        reader.tree_residuals = tree_residuals
        log.removeHandler(log_lines)
    prompts = part["vectors"].swapaxes(0, 1)  # [templates, concepts, layers, d_model]
    alone = part["token_activations"][::SINGLE, None]
    is_whole = not trees or any("runs whole" in line for line in log_lines.lines)
    tokens = part["token_vocab"][::SINGLE].tolist()
    return Vectors(prompts.reshape(-1, *prompts.shape[2:]), alone), request.layers, tokens, is_whole


class _LogLines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _brief(line: str, teacher: Path, place: Path) -> str:
    """A refusal without the names of this machine, and without lists of what else there is."""
    line = re.sub(rf"^--teacher ({re.escape(str(teacher))}|{re.escape(teacher.stem)}): ", "", line)
    line = line.replace(str(teacher), "FOLDER").replace(str(place), "FOLDER")
    line = re.sub(r"<class '(\w+\.)*(\w+)'>", r"\2", line).partition(" Model type should be one of")[0]
    return line if len(line) <= LONGEST else line[:LONGEST].rsplit(" ", 1)[0] + " …"


def traits(model: Any) -> list[str]:
    """What a model's parts and configuration tell of how it is special."""
    config = model.config.get_text_config()
    kinds = {type(module).__name__ for module in model.modules()}
    names = [name for name, _ in model.named_parameters()]
    rotary = getattr(config, "rope_parameters", None) or {}
    rotaries = [held for held in (rotary, *rotary.values()) if isinstance(held, dict)]
    scaled = sorted({held.get("rope_type", "default") for held in rotaries} - {"default"})
    layers = set(getattr(config, "layer_types", None) or ())

    def has(*parts: str) -> bool:
        return any(part in name.split(".") or f"{part}." in name for name in names for part in parts)

    if getattr(config, "alibi", False) or kinds & {"BloomModel", "MptModel"}:
        positions = "ALiBi"
    elif any("Rotary" in kind for kind in kinds) or hasattr(config, "rotary_dim"):
        is_partial = any(held.get("partial_rotary_factor", 1.0) < 1 for held in rotaries)
        positions = ("partly rotary" if is_partial else "rotary") + "".join(f" ({kind})" for kind in scaled)
    elif has("wpe", "embed_positions", "position_embeddings", "positions_embed", "position_embedding"):
        positions = "learned positions"
    else:
        positions = ""
    named = {
        "sliding_attention": "sliding windows", "chunked_attention": "chunked attention", "conv": "short convolutions",
        "linear_attention": "linear attention or state space", "indexed_attention": "sparse attention",
        "hybrid": "hybrid blocks", "hybrid_sliding": "hybrid blocks",
    }  # fmt: skip
    found = {
        positions: bool(positions),
        **{named[kind]: True for kind in sorted(layers & named.keys())},
        "sliding windows": "sliding_attention" in layers
        or (not layers and bool(getattr(config, "sliding_window", None)) and "use_sliding_window" not in vars(config)),
        "mixture of experts": any("expert" in name for name in names),
        "latent attention": any("kv_a_" in name for name in names),
        "attention sinks": any("sink" in name for name in names),
        "normed queries and keys": has("q_norm", "q_layernorm", "query_norm", "qk_norm"),
        "soft-capped scores": bool(getattr(config, "attn_logit_softcapping", None)),
        "norms after each part": has("post_feedforward_layernorm", "post_mlp_layernorm"),
        "embeddings narrower than the stream": getattr(config, "word_embed_proj_dim", config.hidden_size)
        < config.hidden_size,
    }
    return [name for name, is_so in found.items() if is_so]


def power(value: float) -> str:
    """The nearest power of ten."""
    return f"1e{round(math.log10(max(value, TINY))):+d}".replace("+", "")


def largest_exponent(cell: str) -> int | None:
    """The larger power of ten in a cell of the table; None in one of a refusal."""
    return max(map(int, re.findall(r"\b1e(-?\d+)\b", cell))) if cell.startswith("1e") else None


def _cell(reading: TokenFeatures, errors: Sequence[float]) -> str:
    if reading.verdict == "right":
        return " to ".join(dict.fromkeys(map(power, errors)))
    reason = re.sub(r"https?://[^\s|]+", "(a link)", f"{reading.refused or reading.failed}")
    return f"{reading.verdict}: {reason}".replace("|", "/")


def row(finding: Finding) -> list[str]:
    """The cells of a family's row."""
    exact, short = finding.readings.values()
    shares = "" if exact.verdict != "right" else "no" if exact.is_whole else "yes"
    cells = [_cell(exact, exact.largest[:1]), _cell(short, (short.typical[0], short.largest[0]))]
    if exact.refused and exact.refused == short.refused:
        cells[1] = "the same"
    return [finding.family.name, finding.class_name, finding.special, shares, *cells]


def page(findings: Sequence[Finding]) -> str:
    """The page of the documentation."""
    counts = Counter(finding.verdict for finding in findings)
    introduction = INTRODUCTION.format(
        total=len(findings), right=counts["right"], refused=counts["refused"], version=transformers.__version__
    )
    lines = [introduction, "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row(finding)) + " |" for finding in findings)])


def line(finding: Finding) -> str:
    """A finding in one line, with all its figures."""
    cells = [f"{finding.family.name}: {finding.verdict}"]
    for dtype, reading in finding.readings.items():
        figures = (
            f"{reading.largest[0]:.1e} median {reading.typical[0]:.1e}"
            f" (plain {reading.largest[1]:.1e}, {reading.typical[1]:.1e}), {'whole' if reading.is_whole else 'shared'}"
        )
        cells.append(f"{dtype} {reading.refused or reading.failed or figures}")
    return " | ".join([*cells, *finding.notes])


def main() -> None:
    """Print lines, or the table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    patterns = sys.argv[1:]
    findings = []
    for name, family in FAMILIES.items():
        if patterns and not any(re.fullmatch(pattern, name) for pattern in patterns):
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                findings.append(examine(family, Path(place)))
                text = line(findings[-1])
            except Exception as error:
                text = f"{name}: not made: {type(error).__name__} {' '.join(str(error).split())[:300]}"
        (sys.stdout if patterns else sys.stderr).write(f"{text}\n")
    if not patterns:
        sys.stdout.write(page(findings) + "\n")


if __name__ == "__main__":
    main()
