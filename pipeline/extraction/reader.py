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
from pipeline.extraction.parts import Part, PartPlan
from pipeline.extraction.request import Request
from pipeline.storage import write_atomically
from pipeline.teachers.find import Teacher
from pipeline.teachers.prompts import Prompt, template_prefix, tokenize
from pipeline.teachers.residuals import TreeUnsupported, can_run_trees, prefix_states, residuals, tree_residuals
from pipeline.teachers.token_tree import TokenTree, common_prefix, grow

CPU_BATCH_TOKENS = 1536  # matrix products reach their full rate there, and activations still fit in the cache
GPU_BATCH_TOKENS = 16384
# How far a vector read through the tree may be from the plain pass, in units of its norm: rounding. Where it is
# farther, prompts run whole: slower, and never wrong.
TOLERANCE = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.02, "int8": 0.02}
LONG_TOKENS = 64  # after the common beginning: longer prompts have trees of their own
# What a pass costs besides its tokens, in tokens of SmolLM2-135M on a CPU: itself, each level of a tree, and a node's
# look at each of those before it. Larger models spend less of their time on these.
PASS_COST = 40
LEVEL_COST = 2
STEP_COST = 1 / 96

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


def read_parts(
    teacher: Teacher,
    request: Request,
    plan: PartPlan,
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
    reader = Reader(teacher, request, batch_tokens or plan.batch_tokens, progress)

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
            values, tokens = reader.read(prompts)
            alone = reader.read_isolated_tokens(prompts[0])
            if written is not None:
                written.result()
            held, copied = _to_host(values)
            written = writing.submit(_write_part, teacher, request, plan, part, prompts, held, copied, alone)
            cost.tokens += tokens
            cost.prompts += len(prompts) * len(prompts[0])
        assert written is not None
        written.result()
    cost.seconds = time.perf_counter() - begin
    return cost


def read_texts(
    teacher: Teacher,
    texts: Sequence[str],
    template: str,
    layer: int,
    pool: str,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda prompts: None,
) -> NDArray[np.float32]:
    """The teacher's activation vectors of any texts, in memory, ``[n, d_model]``.

    Args:
        teacher: the model.
        texts: what to put into the template.
        template: a prompt with ``{concept}``.
        layer: the block to read after.
        pool: "last" or "mean".
        batch_tokens: tokens of a batch; found from the device by default.
        progress: called after each batch with its number of prompts.
    """
    return _read_prompts(teacher, tokenize(teacher, texts, template), layer, pool, batch_tokens, progress)


def read_vocabulary(
    teacher: Teacher,
    template: str,
    block: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda prompts: None,
) -> NDArray[np.float32]:
    """The residual stream at an early block for every token of the vocabulary by itself, ``[vocabulary, d_model]``.

    The token stands after what the template begins with, as in `Reader.read_isolated_tokens`.
    """
    before = template_prefix(teacher, template)
    prompts = [Prompt([*before, token], [len(before)]) for token in range(len(teacher.embedding_table))]
    return _read_prompts(teacher, prompts, block, "mean", batch_tokens, progress)


def _read_prompts(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    layer: int,
    pool: str,
    batch_tokens: int | None,
    progress: Callable[[int], None],
) -> NDArray[np.float32]:
    if not prompts:
        return np.empty((0, teacher.d_model), np.float32)
    request = Request(
        (), (), (), (layer,), (), teacher.name, teacher.revision, pool, teacher.dtype, depth=len(teacher.blocks)
    )
    tokens = batch_tokens or automatic_batch_tokens(teacher.model.config, teacher.device)
    values, _ = Reader(teacher, request, tokens, progress).read([prompts])  # [n, 1, 1, d_model]
    return values[:, 0, 0].cpu().numpy()


class Reader:
    """Reads parts one after the other and remembers what it found out about the teacher and the device.

    Args:
        teacher: the model.
        request: what is asked for.
        batch_tokens: tokens of a batch; halved whenever memory runs out.
        progress: called after each batch with its number of prompts.
    """

    def __init__(self, teacher: Teacher, request: Request, batch_tokens: int, progress: Callable[[int], None]) -> None:
        self.teacher, self.request, self.progress = teacher, request, progress
        self.batch_tokens = batch_tokens
        self.shared: bool | None = None  # unknown until the first tree has been compared with the plain pass
        if not can_run_trees(teacher):
            self._go_on_whole(TreeUnsupported("attention that cannot be exchanged, or a convolution over tokens"))

    def read(self, prompts: Sequence[Sequence[Prompt]]) -> tuple[Tensor, int]:
        """The vectors of a part, ``[rows, templates, layers, d_model]`` in float32, and how many tokens ran for them.

        Args:
            prompts: of each template, those of the part's concepts.
        """
        while True:
            try:
                return self._read(prompts)
            except TreeUnsupported as error:
                self._go_on_whole(error)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                if _is_out_of_memory(error):
                    self._halve(error)
                elif self.shared is None:  # the model takes no tree of tokens
                    self._go_on_whole(error)
                else:
                    raise InputError(
                        f"--teacher {self.teacher.name}: its own forward pass fails: {type(error).__name__}: {error}"
                    ) from error

    def _go_on_whole(self, error: Exception) -> None:
        log.warning("teacher %s: cannot share what prompts begin with; each runs whole", self.teacher.name)
        log.debug("because", exc_info=error)
        self.shared = False

    def read_isolated_tokens(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """The residual stream at the request's token block for each distinct token of the concepts by itself.

        The token stands after what the template begins with, and no other token of a concept is before it.

        Returns:
            ``[types, d_model]``, by ascending token id; ``[0, d_model]`` where none is asked for.
        """
        block, width = self.request.token_block, self.teacher.d_model
        if block is None:
            return np.empty((0, width), np.float32)
        types = np.unique([token for prompt in prompts for token in prompt.concept_ids])
        before = template_prefix(self.teacher, self.request.templates[0])
        values = np.empty((len(types), width), np.float32)
        step = max(1, self.batch_tokens // (len(before) + 1))
        for start in range(0, len(types), step):
            batch = torch.tensor([[*before, token] for token in types[start : start + step].tolist()])
            values[start : start + step] = residuals(self.teacher, batch, [block])[0, :, -1].float().cpu().numpy()
        return values

    def _halve(self, error: BaseException) -> None:
        if self.batch_tokens == 1:
            raise WorkError(
                "out of memory with one prompt at a time; use --dtype bfloat16 or --device-map auto "
                "(finished parts are kept, the same command goes on)"
            ) from error
        self.batch_tokens = max(1, self.batch_tokens // 2)
        log.warning("out of memory: going on with %d tokens a batch", self.batch_tokens)
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read(self, prompts: Sequence[Sequence[Prompt]]) -> tuple[Tensor, int]:
        device, pool = self.teacher.device, self.request.pool
        values: Tensor | None = None
        tokens = 0
        for column, of_template in enumerate(prompts):
            for is_tree, batch, paths, prefix, streams in self._batches(of_template):
                chosen = [of_template[row] for row in batch]
                nodes, weights = _positions(chosen, paths, prefix, pool)
                place, share = torch.from_numpy(nodes).to(device), torch.from_numpy(weights).to(device)
                # [prompts, layers, d_model], the mean over a prompt's positions in float32
                pooled = torch.stack([(stream[place].float() * share[..., None]).sum(1) for stream in streams], 1)
                if self.shared is None and is_tree:
                    self._compare(chosen, pooled)
                if values is None:
                    values = torch.empty(len(of_template), len(prompts), *pooled.shape[1:], device=device)
                values[torch.from_numpy(batch).to(device), column] = pooled
                tokens += len(streams[0])
                self.progress(len(batch))
        assert values is not None
        return values, tokens

    def _compare(self, prompts: Sequence[Prompt], pooled: Tensor) -> None:
        """Compare vectors with those of the plain pass: the first, last, shortest and longest prompts of a tree.

        Raises:
            CannotShare: they differ.
        """
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row].token_ids))
        for row in {0, len(prompts) - 1, by_length[0], by_length[-1]}:
            plain = plain_vectors(self.teacher, prompts[row], self.request.layers, self.request.pool)
            error = (pooled[row] - plain).norm(dim=-1) / plain.norm(dim=-1)
            if not (error < TOLERANCE[self.request.dtype]).all():
                raise TreeUnsupported(f"vectors differ from the plain pass by {float(error.max()):.2g}")
        self.shared = True

    def _batches(
        self, prompts: Sequence[Prompt]
    ) -> Iterator[tuple[bool, NDArray[np.int64], NDArray[np.int64], int, Sequence[Tensor]]]:
        """Batches of prompts run through the teacher.

        Yields:
            Whether they ran as a tree, which prompts, their nodes ``[prompts, positions]``, how many positions come
            before the first node, and for each layer the residual stream ``[nodes, d_model]``.
        """
        layers = self.request.layers
        token_ids = [prompt.token_ids for prompt in prompts]
        rows = np.arange(len(prompts))
        if self.shared is not False:
            # The positions that are read stay out of the prefix: only the tree's are kept.
            prefix = common_prefix(token_ids, min(prompt.read(self.request.pool)[0] for prompt in prompts))
            states = prefix_states(self.teacher, token_ids[0][:prefix], layers)
            whole = []
            for tree in grow(token_ids, prefix, self.batch_tokens, LONG_TOKENS):
                if self._is_cheaper_whole(tree, prefix):
                    whole.append(tree.prompts)
                else:
                    yield True, tree.prompts, tree.paths, prefix, tree_residuals(self.teacher, tree, states, layers)
            rows = np.sort(np.concatenate([np.empty(0, np.int64), *whole]))
        lengths = np.array([len(token_ids[row]) for row in rows], np.int64)
        for length in map(int, np.unique(lengths)):
            alike = rows[lengths == length]
            for batch in np.array_split(alike, math.ceil(len(alike) * length / max(self.batch_tokens, length))):
                stream = residuals(self.teacher, torch.tensor([token_ids[row] for row in batch]), layers)
                nodes = np.arange(batch.size * length, dtype=np.int64).reshape(-1, length)
                yield False, batch.astype(np.int64), nodes, 0, list(stream.flatten(1, 2))

    def _is_cheaper_whole(self, tree: TokenTree, prefix: int) -> bool:
        """Whether prompts cost less one by one than their tree, whose attention looks at each node's way by itself."""
        steps = sum(way.size for _, way in tree.levels)
        shared = PASS_COST + len(tree.token_ids) + LEVEL_COST * len(tree.levels) + STEP_COST * steps
        lengths = (tree.paths >= 0).sum(1) + prefix
        return shared > float(lengths.sum()) + PASS_COST * len(np.unique(lengths))


def plain_vectors(teacher: Teacher, prompt: Prompt, layers: Sequence[int], pool: str) -> Tensor:
    """A prompt's vectors by the plain pass, alone, ``[layers, d_model]`` in float32."""
    stream = residuals(teacher, torch.tensor([prompt.token_ids]), layers)
    return stream[:, 0, prompt.read(pool)].float().mean(1)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


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
    plan: PartPlan,
    part: Part,
    prompts: Sequence[Sequence[Prompt]],
    values: Tensor,
    copied: torch.cuda.Event | None,
    alone: NDArray[np.float32],
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
    own = [prompt.concept_ids for prompt in prompts[0]]
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
        "token_activations": alone,
        "in_sink": (np.array(starts) == 0).any(0),
        "peaks": np.array([np.abs(held).max(initial=0) for held in (embeddings, vectors, alone)]),
    }
    write_atomically(part.path, lambda path: save_file(tensors, path))
    plan.publish(part)
