"""How fast vectors are extracted: the peers, ours, and the floor. Run: make bench.

All read the same weights, concepts and block, and their vectors are compared. The plain loop is what most code does:
one prompt at a time, `output_hidden_states`. TransformerLens and nnsight get batches of like length and stop at the
block. Ours is timed from the request to the finished file. The floor is the time of the matrix products that the
tokens after the template's shared beginning need, at the rate at which this machine multiplies by these very weights,
measured just before. Medians of several rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pipeline.data.concepts import read_catalogue
from pipeline.data.vectors import read_vectors
from pipeline.extraction.parts import PartPlan, merge, read_parts
from pipeline.extraction.reader import automatic_batch_tokens
from pipeline.extraction.request import Request, make_request
from pipeline.processes import start
from pipeline.storage import Output
from pipeline.teachers.find import Teacher, TeacherSource, find_teacher
from pipeline.teachers.load import load_teacher
from pipeline.teachers.residuals import flops_per_token
from pipeline.teachers.token_tree import common_prefix

Floats = NDArray[np.floating[Any]]
PEER_BATCH = 128  # prompts; of 32, 64, 128, 256 and 512 the fastest for both peers on two cores, with 64 equal


def matmul_rate(teacher: Teacher, layer: int, rows: int, dtype: torch.dtype) -> float:
    """Operations a second of the products with the teacher's own matrices, up to the block."""
    weights = [
        module.weight.to(dtype)
        for block in teacher.blocks[:layer]
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]).to(dtype) for weight in weights}
    times = []
    with torch.inference_mode():
        for _ in range(4):
            begin = time.perf_counter()
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
            times.append(time.perf_counter() - begin)
    return 2 * rows * sum(weight.numel() for weight in weights) / min(times)


def batches_by_length(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Rows of texts in batches of like length, so that peers pad little."""
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    return [order[start : start + PEER_BATCH] for start in range(0, len(order), PEER_BATCH)]


def plain_loop(causal: Any, tokenizer: Any, texts: list[str], layer: int) -> Floats:
    """One prompt at a time, all blocks, logits, all hidden states."""
    rows = []
    with torch.inference_mode():
        for text in texts:
            states = causal(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            rows.append(states[layer][0, -1].numpy())
    return np.stack(rows)


def with_transformer_lens(bridge: Any, tokenizer: Any, texts: list[str], layer: int) -> Floats:
    """TransformerLens, stopping at the block."""
    found: list[Any] = [None] * len(texts)
    for rows in batches_by_length(tokenizer, texts):
        encoded = tokenizer([texts[row] for row in rows], return_tensors="pt", padding=True, padding_side="right")
        with torch.inference_mode():
            stream = bridge(
                encoded["input_ids"], attention_mask=encoded["attention_mask"], return_type=None, stop_at_layer=layer
            )
        last = encoded["attention_mask"].sum(1) - 1
        for row, vector in zip(rows, stream[torch.arange(len(rows)), last].numpy(), strict=True):
            found[row] = vector
    return np.stack(found)


def with_nnsight(model: Any, tokenizer: Any, texts: list[str], layer: int) -> Floats:
    """Nnsight, stopping after the block."""
    found: list[Any] = [None] * len(texts)
    for rows in batches_by_length(tokenizer, texts):
        encoded = tokenizer([texts[row] for row in rows], return_tensors="pt", padding=True, padding_side="right")
        with torch.inference_mode(), model.trace(dict(encoded)) as tracer:
            stream = model.model.layers[layer - 1].output.save()
            tracer.stop()
        last = encoded["attention_mask"].sum(1) - 1
        stream = stream[0] if isinstance(stream, tuple) else stream
        for row, vector in zip(rows, stream[torch.arange(len(rows)), last].numpy(), strict=True):
            found[row] = vector
    return np.stack(found)


def ours(source: TeacherSource, teacher: Teacher, request: Request, folder: Path) -> Path:
    """From the request to the finished file."""
    output = folder / f"{request.dtype}.safetensors"
    output.unlink(missing_ok=True)
    tokens = automatic_batch_tokens(source.config, teacher.device)
    plan = PartPlan.open(Output(output), request, source.config.get_text_config().hidden_size, 1, tokens)
    read_parts(teacher, request, plan, plan.missing())
    merge(request, plan)
    return output


def agreement(found: Floats, truth: Floats) -> str:
    """Mean and least centred cosine over concepts."""
    mean = truth.mean(0)
    a, b = found - mean, truth - mean
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return f"{cosine.mean():.5f} ({cosine.min():.5f})"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--concepts", type=int, default=1500)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--teacher", default="smollm2-135m")
    options = parser.parse_args()
    from nnsight import LanguageModel
    from transformer_lens.model_bridge import TransformerBridge

    start()
    catalogue = read_catalogue(str(Path(__file__).parent.parent / "data" / "concepts.csv"))
    source = find_teacher(options.teacher, "float32")
    short_source = replace(source, dtype="bfloat16")
    teacher, short = load_teacher(source), load_teacher(short_source)
    asked: dict[str, Any] = {"layers": str(options.layer), "templates": ["Tell me about {concept}"]}
    request = make_request(source, catalogue, count=options.concepts, **asked)
    short_request = replace(request, dtype="bfloat16")
    texts = [f"Tell me about {concept}" for concept in request.concepts]
    tokenizer = teacher.tokenizer
    causal = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32, **source.options)
    causal.eval()  # type: ignore[no-untyped-call]
    peer: Any = copy.deepcopy(causal)
    bridge = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=peer, tokenizer=tokenizer, device="cpu"
    )
    sight = LanguageModel(copy.deepcopy(causal), tokenizer=tokenizer)

    ids = tokenizer(texts)["input_ids"]
    prefix = common_prefix(ids, min(map(len, ids)) - 1)
    unshared = sum(len(tokens) - prefix for tokens in ids)
    flops = unshared * flops_per_token(teacher, request.layers)
    home = tempfile.TemporaryDirectory(prefix="bench-")  # removed as the process ends, however it does
    folder = Path(home.name)
    work: dict[str, Callable[[], Floats | Path]] = {
        "plain Hugging Face loop, float32": lambda: plain_loop(causal, tokenizer, texts, options.layer),
        "TransformerLens, float32": lambda: with_transformer_lens(bridge, tokenizer, texts, options.layer),
        "nnsight, float32": lambda: with_nnsight(sight, tokenizer, texts, options.layer),
        "ours, float32": lambda: ours(source, teacher, request, folder),
        "ours, bfloat16": lambda: ours(short_source, short, short_request, folder),
    }
    seconds: dict[str, list[float]] = {}
    found: dict[str, Floats] = {}
    for _ in range(options.rounds):
        for name, call in work.items():
            for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
                if name == f"ours, {label}":
                    rate = matmul_rate(teacher, options.layer, 1024, dtype)
                    seconds.setdefault(f"floor, {label}", []).append(flops / rate)
            begin = time.perf_counter()
            made = call()
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)  # noqa: T201
            found[name] = read_vectors(made).vectors[:, 0, 0] if isinstance(made, Path) else made
    median = {name: statistics.median(times) for name, times in seconds.items()}
    loop = "plain Hugging Face loop, float32"
    print(  # noqa: T201
        f"\n{source.name}, {len(texts)} concepts, block {options.layer}, {torch.get_num_threads()} threads; "
        f"{sum(map(len, ids))} tokens, {unshared} after the shared beginning\n\n"
        "| what | median seconds | concepts/s | x plain loop | share of the floor's rate | centred cosine (least) |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for name in sorted(median, key=lambda name: -median[name]):
        floor = median[f"floor, {name.split(', ')[1]}"]
        cosine = agreement(found[name], found[loop]) if name in found else ""
        print(  # noqa: T201
            f"| {name} | {median[name]:.2f} | {len(texts) / median[name]:,.0f} | {median[loop] / median[name]:.1f} "
            f"| {floor / median[name]:.0%} | {cosine} |"
        )


if __name__ == "__main__":
    main()
