"""Vectors of prompts: through a token tree where the teacher allows it, whole where it does not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import InputError, WorkError
from pipeline.extraction.request import Request
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
# Costs of a pass besides its tokens, in tokens of SmolLM2-135M on a CPU: the pass itself, each level of a tree, and
# each pair of a node and an ancestor in attention. Larger models spend less of their time on these.
PASS_COST = 40
LEVEL_COST = 2
PAIR_COST = 1 / 96

Ints = NDArray[np.int64]

log = logging.getLogger(__name__)


def automatic_batch_tokens(teacher_config: Any, device: torch.device) -> int:
    """Tokens of a batch that use the device well: from the cache on a CPU, from the free memory on a GPU."""
    if device.type != "cuda":
        return CPU_BATCH_TOKENS
    text = teacher_config.get_text_config()
    widest = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    token_bytes = 4 * (16 * text.hidden_size + 4 * widest)  # activations of one block, generously
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(GPU_BATCH_TOKENS, max(256, free // 2 // token_bytes)))


def read_texts(teacher: Teacher, texts: Sequence[str], template: str, layer: int, pool: str) -> NDArray[np.float32]:
    """Activation vectors ``[texts, d_model]`` of any texts in a template, after a block, in memory."""
    return _read_prompts(teacher, tokenize(teacher, texts, template), layer, pool)


def read_vocabulary(
    teacher: Teacher, template: str, block: int, progress: Callable[[int], None] = lambda prompts: None
) -> NDArray[np.float32]:
    """Residual stream at an early block of every token after the template's beginning, ``[vocabulary, d_model]``."""
    before = template_prefix(teacher, template)
    prompts = [Prompt([*before, token], [len(before)]) for token in range(len(teacher.embedding_table))]
    return _read_prompts(teacher, prompts, block, "mean", progress)


def _read_prompts(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    layer: int,
    pool: str,
    progress: Callable[[int], None] = lambda prompts: None,
) -> NDArray[np.float32]:
    if not prompts:
        return np.empty((0, teacher.d_model), np.float32)
    request = Request(
        (), (), (), (layer,), (), teacher.name, teacher.revision, pool, teacher.dtype, depth=len(teacher.blocks)
    )
    tokens = automatic_batch_tokens(teacher.model.config, teacher.device)
    values, _ = Reader(teacher, request, tokens, progress).read([prompts])  # [prompts, 1, 1, d_model]
    return values[:, 0, 0].cpu().numpy()


@dataclass
class Reader:
    """Reads prompts and remembers what it finds out about the teacher and the device."""

    teacher: Teacher
    request: Request
    batch_tokens: int  # halved whenever memory runs out
    progress: Callable[[int], None]  # called after each batch with its number of prompts
    uses_trees: bool | None = field(default=None, init=False)  # None until the first tree equals the plain pass

    def __post_init__(self) -> None:
        if not can_run_trees(self.teacher):
            self._give_up_trees(TreeUnsupported("attention that cannot be exchanged, or a convolution over tokens"))

    def read(self, prompts: Sequence[Sequence[Prompt]]) -> tuple[Tensor, int]:
        """Read the vectors of prompts.

        Args:
            prompts: of each template, those of the same concepts.

        Returns:
            ``[concepts, templates, layers, d_model]`` in float32, and the number of tokens that ran for them.

        Raises:
            InputError: the model's own forward pass fails.
            WorkError: out of memory with one prompt at a time.
        """
        while True:
            try:
                return self._read(prompts)
            except TreeUnsupported as error:
                self._give_up_trees(error)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                    self._halve_batches(error)
                elif self.uses_trees is None:  # the model fails on a tree
                    self._give_up_trees(error)
                else:
                    raise InputError(
                        f"--teacher {self.teacher.name}: its own forward pass fails: {type(error).__name__}: {error}"
                    ) from error

    def read_isolated_tokens(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Read each distinct token of concepts at the request's token block, after the first template's beginning.

        Returns:
            ``[types, d_model]``, by ascending token id; ``[0, d_model]`` where the request has no token block.
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

    def _give_up_trees(self, error: Exception) -> None:
        log.warning("teacher %s: cannot share what prompts begin with; each runs whole", self.teacher.name)
        log.debug("because", exc_info=error)
        self.uses_trees = False

    def _halve_batches(self, error: BaseException) -> None:
        if self.batch_tokens == 1:
            raise WorkError(
                "out of memory with one prompt at a time; use --dtype bfloat16 or --device-map auto "
                "(finished parts are kept, the same command goes on)"
            ) from error
        self.batch_tokens //= 2
        log.warning("out of memory: going on with %d tokens a batch", self.batch_tokens)
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read(self, prompts: Sequence[Sequence[Prompt]]) -> tuple[Tensor, int]:
        device = self.teacher.device
        shape = len(prompts[0]), len(prompts), len(self.request.layers), self.teacher.d_model
        values = torch.empty(shape, device=device)
        tokens = 0
        for column, of_template in enumerate(prompts):
            for is_tree, rows, paths, prefix, streams in self._batches(of_template):
                batch = [of_template[row] for row in rows]
                nodes, weights = _pooling(batch, paths, prefix, self.request.pool)
                at, weight = torch.from_numpy(nodes).to(device), torch.from_numpy(weights).to(device)
                # [prompts, layers, d_model], the mean over a prompt's positions in float32
                pooled = torch.stack([(stream[at].float() * weight[..., None]).sum(1) for stream in streams], 1)
                if self.uses_trees is None and is_tree:
                    self._compare_with_plain_pass(batch, pooled)
                values[torch.from_numpy(rows).to(device), column] = pooled
                tokens += len(streams[0])
                self.progress(len(rows))
        return values, tokens

    def _compare_with_plain_pass(self, prompts: Sequence[Prompt], pooled: Tensor) -> None:
        """Compare the first, last, shortest and longest prompts of a tree with their plain pass."""
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row].token_ids))
        for row in {0, len(prompts) - 1, by_length[0], by_length[-1]}:
            plain = plain_vectors(self.teacher, prompts[row], self.request.layers, self.request.pool)
            error = (pooled[row] - plain).norm(dim=-1) / plain.norm(dim=-1)
            if not (error < TOLERANCE[self.request.dtype]).all():
                raise TreeUnsupported(f"vectors differ from the plain pass by {float(error.max()):.2g}")
        self.uses_trees = True

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[bool, Ints, Ints, int, Sequence[Tensor]]]:
        """Run prompts through the teacher in batches.

        Yields:
            Whether the batch ran as a tree, the rows of its prompts, their nodes ``[prompts, positions]``, the number
            of positions before the first node, and for each layer the residual stream ``[nodes, d_model]``.
        """
        layers = self.request.layers
        token_ids = [prompt.token_ids for prompt in prompts]
        rows = np.arange(len(prompts))
        if self.uses_trees is not False:
            # The positions that are read stay out of the prefix: only the tree's are kept.
            prefix = common_prefix(token_ids, min(prompt.pooled(self.request.pool)[0] for prompt in prompts))
            states = prefix_states(self.teacher, token_ids[0][:prefix], layers)
            whole = [np.empty(0, np.int64)]
            for tree in grow(token_ids, prefix, self.batch_tokens, LONG_TOKENS):
                if _is_cheaper_whole(tree, prefix):
                    whole.append(tree.prompts)
                else:
                    yield True, tree.prompts, tree.paths, prefix, tree_residuals(self.teacher, tree, states, layers)
            rows = np.sort(np.concatenate(whole))
        lengths = np.array([len(token_ids[row]) for row in rows], np.int64)
        for length in np.unique(lengths).tolist():
            same_length = rows[lengths == length]
            batches = math.ceil(len(same_length) * length / max(self.batch_tokens, length))
            for batch in np.array_split(same_length, batches):
                stream = residuals(self.teacher, torch.tensor([token_ids[row] for row in batch]), layers)
                nodes = np.arange(batch.size * length, dtype=np.int64).reshape(-1, length)
                yield False, batch, nodes, 0, list(stream.flatten(1, 2))


def plain_vectors(teacher: Teacher, prompt: Prompt, layers: Sequence[int], pool: str) -> Tensor:
    """A prompt's vectors by the plain pass, alone, ``[layers, d_model]`` in float32."""
    stream = residuals(teacher, torch.tensor([prompt.token_ids]), layers)
    return stream[:, 0, prompt.pooled(pool)].float().mean(1)


def _is_cheaper_whole(tree: TokenTree, prefix: int) -> bool:
    """Whether a tree's prompts cost less whole than as a tree, in which each node attends to its ancestors apart."""
    pairs = sum(ancestors.size for _, ancestors in tree.levels)
    tree_cost = PASS_COST + len(tree.token_ids) + LEVEL_COST * len(tree.levels) + PAIR_COST * pairs
    lengths = (tree.paths >= 0).sum(1) + prefix
    return tree_cost > float(lengths.sum()) + PASS_COST * len(np.unique(lengths))


def _pooling(prompts: Sequence[Prompt], paths: Ints, prefix: int, pool: str) -> tuple[Ints, NDArray[np.float32]]:
    """The nodes that make up each prompt's vector and their weights, ``[prompts, positions]`` both."""
    pooled = [prompt.pooled(pool) for prompt in prompts]
    nodes = np.zeros((len(prompts), max(map(len, pooled))), np.int64)
    weights = np.zeros(nodes.shape, np.float32)
    for row, positions in enumerate(pooled):
        nodes[row, : len(positions)] = paths[row, np.array(positions) - prefix]
        weights[row, : len(positions)] = 1 / len(positions)
    return nodes, weights
