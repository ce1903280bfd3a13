"""Extraction: parts of a request through the teacher, each written to disk as it is finished."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from pipeline.errors import InputError, WorkError
from pipeline.forward import prefix_states, residuals, shares_prefixes, tree_residuals
from pipeline.plan import Part, Plan, Request
from pipeline.storage import write_atomically
from pipeline.teachers import Teacher
from pipeline.trees import common_prefix, grow

CPU_BATCH_TOKENS = 1024  # matrix products reach their full rate there, and activations still fit in the cache
GPU_BATCH_TOKENS = 16384

log = logging.getLogger(__name__)


@dataclass
class Cost:
    """What the reading took: tokens that went through the blocks, and the time for it."""

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0


def automatic_batch_tokens(teacher_config: Any, device: torch.device) -> int:
    """Tokens of a batch that use the device well: from the cache on a CPU, from the free memory on a GPU."""
    if device.type != "cuda":
        return CPU_BATCH_TOKENS
    text = teacher_config.get_text_config()
    widest = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    token_bytes = 4 * (16 * text.hidden_size + 4 * widest)  # activations of one block, generously
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(GPU_BATCH_TOKENS, max(256, free // 2 // token_bytes)))


@dataclass(frozen=True)
class Prompt:
    """One concept in one template, as tokens.

    Attributes:
        token_ids: the prompt's tokens.
        own: which of them overlap the concept's characters, ascending.
    """

    token_ids: list[int]
    own: list[int]

    def read(self, pool: str) -> list[int]:
        """The positions whose residual stream makes the vector."""
        return self.own if pool == "mean" else [len(self.token_ids) - 1]


def tokenize(teacher: Teacher, concepts: Sequence[str], template: str) -> list[Prompt]:
    """Every concept in a template as tokens, with the positions of the concept's own.

    Raises:
        InputError: a concept that leaves no token of its own, or a prompt longer than the teacher's context.
    """
    start = template.index("{concept}")
    texts = [template.replace("{concept}", concept) for concept in concepts]
    encoded = teacher.tokenizer(texts, return_offsets_mapping=True)
    room = getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None)
    prompts = []
    for concept, ids, spans in zip(concepts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        stop = start + len(concept)
        own = [position for position, (left, right) in enumerate(spans) if left < stop and right > start]
        if not own:
            raise InputError(f"concept {concept!r}: the teacher's tokenizer gives it no token")
        if room is not None and len(ids) > room:
            raise InputError(f"concept {concept[:60]!r}: its prompt has {len(ids)} tokens, the teacher takes {room}")
        prompts.append(Prompt(list(ids), own))
    return prompts


def read_parts(
    teacher: Teacher,
    request: Request,
    plan: Plan,
    parts: Sequence[Part],
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda prompts: None,
) -> Cost:
    """Read parts of a request and write each as it is finished.

    Tokenizing the next part and writing the one before go on in threads beside the teacher's work.

    Args:
        teacher: the model.
        request: what is asked for.
        plan: how it is cut.
        parts: the parts to read.
        batch_tokens: tokens of a batch, instead of the plan's.
        progress: called after each batch with its number of prompts.

    Raises:
        InputError: a concept without tokens, or vectors that overflow in the teacher's precision.
        WorkError: out of memory even with one prompt at a time.
    """
    cost = Cost()
    if not parts:
        return cost
    trial = [
        prompt.token_ids
        for template in request.templates
        for prompt in tokenize(teacher, _trial(request.concepts), template)
    ]
    shared = shares_prefixes(teacher, trial, request.layers)
    if not shared:
        log.warning("teacher %s: its attention cannot share prefixes; every prompt runs whole", teacher.name)
    batch_tokens = batch_tokens or plan.batch_tokens

    def prepare(part: Part) -> list[list[Prompt]]:
        concepts = request.concepts[part.start : part.stop]
        return [tokenize(teacher, concepts, template) for template in request.templates]

    begin = time.perf_counter()
    with ThreadPoolExecutor(1) as tokenizing, ThreadPoolExecutor(1) as writing:
        ahead = tokenizing.submit(prepare, parts[0])
        written = None
        for number, part in enumerate(parts):
            prompts = ahead.result()
            if number + 1 < len(parts):
                ahead = tokenizing.submit(prepare, parts[number + 1])
            values, tokens, batch_tokens = _read_halving(teacher, request, prompts, batch_tokens, shared, progress)
            if written is not None:
                written.result()
            held, copied = _to_host(values)
            written = writing.submit(_write_part, teacher, request, part, prompts, held, copied)
            cost.tokens += tokens
            cost.prompts += len(prompts) * len(prompts[0])
        assert written is not None
        written.result()
    cost.seconds = time.perf_counter() - begin
    return cost


def _trial(concepts: Sequence[str]) -> list[str]:
    """Concepts on which the shared pass is tried: the first, and a long one."""
    return sorted({concepts[0], max(concepts[:1000], key=len)})


def _read_halving(
    teacher: Teacher,
    request: Request,
    prompts: Sequence[Sequence[Prompt]],
    batch_tokens: int,
    shared: bool,
    progress: Callable[[int], None],
) -> tuple[Tensor, int, int]:
    """`_read`, with half the tokens of a batch whenever memory runs out; gives also what it came to."""
    while True:
        try:
            return *_read(teacher, request, prompts, batch_tokens, shared, progress), batch_tokens
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if batch_tokens == 1:
                raise WorkError(
                    "out of memory with one prompt at a time; use --dtype bfloat16 or --device-map auto "
                    "(finished parts are kept, the same command goes on)"
                ) from error
        batch_tokens = max(1, batch_tokens // 2)
        log.warning("out of memory: going on with %d tokens a batch", batch_tokens)
        if teacher.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _read(
    teacher: Teacher,
    request: Request,
    prompts: Sequence[Sequence[Prompt]],
    batch_tokens: int,
    shared: bool,
    progress: Callable[[int], None],
) -> tuple[Tensor, int]:
    """The vectors of a part, ``[rows, templates, layers, d_model]`` in float32, and how many tokens ran for them."""
    values: Tensor | None = None
    tokens = 0
    for column, of_template in enumerate(prompts):
        for batch, paths, prefix, streams in _batches(teacher, request, of_template, batch_tokens, shared):
            nodes, weights = _positions([of_template[row] for row in batch], paths, prefix, request.pool)
            place, share = torch.from_numpy(nodes).to(teacher.device), torch.from_numpy(weights).to(teacher.device)
            # [prompts, layers, d_model], the mean over a prompt's positions in float32
            pooled = torch.stack([(stream[place].float() * share[..., None]).sum(1) for stream in streams], 1)
            if values is None:
                shape = (len(of_template), len(prompts), *pooled.shape[1:])
                values = torch.empty(shape, device=teacher.device)
            values[torch.from_numpy(batch).to(teacher.device), column] = pooled
            tokens += len(streams[0])
            progress(len(batch))
    assert values is not None
    return values, tokens


def _batches(
    teacher: Teacher, request: Request, prompts: Sequence[Prompt], batch_tokens: int, shared: bool
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int, Sequence[Tensor]]]:
    """Batches of prompts run through the teacher.

    Yields:
        Which prompts, their nodes ``[prompts, positions]``, how many positions come before the first node, and for
        each layer the residual stream ``[nodes, d_model]``.
    """
    token_ids = [prompt.token_ids for prompt in prompts]
    if shared:
        # The positions that are read stay out of the prefix: only the tree's are kept.
        longest = min(prompt.read(request.pool)[0] for prompt in prompts)
        prefix = common_prefix(token_ids, longest)
        states = prefix_states(teacher, token_ids[0][:prefix], request.layers)
        for tree in grow(token_ids, prefix, batch_tokens):
            yield tree.prompts, tree.paths, prefix, tree_residuals(teacher, tree, states, request.layers)
        return
    lengths = np.array([len(ids) for ids in token_ids], np.int64)
    for length in map(int, np.unique(lengths)):
        rows = np.flatnonzero(lengths == length)
        for batch in np.array_split(rows, math.ceil(len(rows) * length / max(batch_tokens, length))):
            stream = residuals(teacher, torch.tensor([token_ids[row] for row in batch]), request.layers)
            nodes = np.arange(batch.size * length, dtype=np.int64).reshape(-1, length)
            yield batch.astype(np.int64), nodes, 0, list(stream.flatten(1, 2))


def _positions(
    prompts: Sequence[Prompt], paths: NDArray[np.int64], prefix: int, pool: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nodes that make up each prompt's vector and how much each counts, ``[prompts, positions]`` both."""
    chosen = [prompt.read(pool) for prompt in prompts]
    nodes = np.zeros((len(prompts), max(map(len, chosen))), np.int64)
    weights = np.zeros(nodes.shape, np.float32)
    for row, positions in enumerate(chosen):
        nodes[row, : len(positions)] = paths[row, np.array(positions) - prefix]
        weights[row, : len(positions)] = 1 / len(positions)
    return nodes, weights


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The values in host memory, and on a GPU the event after which they are there."""
    if not values.is_cuda:
        return values, None
    held = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return held, copied


def _write_part(
    teacher: Teacher,
    request: Request,
    part: Part,
    prompts: Sequence[Sequence[Prompt]],
    values: Tensor,
    copied: torch.cuda.Event | None,
) -> None:
    if copied is not None:
        copied.synchronize()
    vectors = values.numpy()
    if not np.isfinite(vectors).all():
        row = np.flatnonzero(~np.isfinite(vectors).all(axis=(1, 2, 3)))[0]
        raise InputError(
            f"--dtype {request.dtype}: the vector of {request.concepts[part.start + row]!r} is not finite in it; "
            "try --dtype float32"
        )
    own = [[prompt.token_ids[position] for position in prompt.own] for prompt in prompts[0]]
    starts = [[prompt.read(request.pool)[0] for prompt in of_template] for of_template in prompts]
    ids = np.array([token for tokens in own for token in tokens], np.int64)
    vocab = np.unique(ids)
    embeddings = teacher.embedding_table[torch.from_numpy(vocab).to(teacher.device)].float().cpu().numpy()
    tensors = {
        "vectors": vectors,
        "token_ids": ids,
        "token_lengths": np.array([len(tokens) for tokens in own], np.int64),
        "token_vocab": vocab,
        "token_embeddings": embeddings,
        "in_sink": (np.array(starts) == 0).any(0),
        "peaks": np.array([np.abs(embeddings).max(initial=0), np.abs(vectors).max(initial=0)]),
    }
    write_atomically(part.path, lambda path: save_file(tensors, path))
