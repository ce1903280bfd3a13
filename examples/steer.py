"""Steer the teacher with a student's vectors: generate while a concept's direction is added to the residual stream.

    python examples/steer.py --output docs/steering.png

For each concept, the true vector, the student's and a random one of equal length (all centred, after the same block)
are added, times a strength, at every position. What changes is measured on neutral prompts: by how much the teacher
then prefers the concept's words (the mean log-probability of the concept as a continuation), and how far its
next-token distribution moves (Kullback-Leibler divergence). Activation addition: Turner et al. (2023), "Activation
addition: steering language models without optimization".
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline import Student
from pipeline.analysis.intervention import at_block
from pipeline.extraction.reader import read_texts
from pipeline.teachers.find import Teacher, find_teacher
from pipeline.teachers.load import load_teacher

CONCEPTS = ("volcano", "slow cooking", "chess", "sadness", "the ocean", "money", "a violin", "winter")
PROMPTS = ("I think that", "Yesterday we talked about", "The most interesting thing is", "My favourite topic is")
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
RANDOM = 4  # directions drawn for each concept
KINDS = ("true vector", "student's vector", "random vector")
MEASURES = {
    "gain": "gain in log-probability of the concept's words",
    "divergence": "divergence of the next-token distribution (nats)",
}
Floats = NDArray[np.float32]
log = logging.getLogger("steer")


@contextmanager
def steered(teacher: Teacher, layer: int, direction: Tensor) -> Iterator[None]:
    """Add ``direction`` ``[batch or 1, d_model]`` to every position of the residual stream after block ``layer``."""
    with at_block(teacher, layer, lambda stream: stream + direction[:, None].to(stream)):
        yield


@torch.inference_mode()
def logits(teacher: Teacher, ids: Tensor, first: int) -> Tensor:
    """Next-token logits from position ``first`` on, ``[batch, tokens - first, vocabulary]``."""
    return teacher.logits(ids, ids.shape[1] - first % ids.shape[1])


def effect(
    teacher: Teacher, layer: int, prompt: list[int], words: list[int], directions: Tensor
) -> tuple[Tensor, Tensor]:
    """What directions do after a prompt, of which the first should change nothing.

    Returns:
        Mean log-probability of the words, and divergence from the first in nats; ``[directions]`` both.
    """
    ids = torch.tensor([prompt + words]).expand(len(directions), -1)
    with steered(teacher, layer, directions):
        said = logits(teacher, ids, len(prompt) - 1)[:, :-1].log_softmax(-1)  # [directions, words, vocabulary]
    chosen = said.gather(-1, torch.tensor(words).expand(len(directions), -1)[..., None]).mean((1, 2))
    after = said[:, 0]
    return chosen, (after[0].exp() * (after[0] - after)).sum(-1)


def generate(teacher: Teacher, layer: int, prompt: str, direction: Tensor, tokens: int = 14) -> str:
    """The most probable continuation, token by token."""
    ids = torch.tensor([list(teacher.tokenizer(prompt)["input_ids"])])
    with steered(teacher, layer, direction):
        for _ in range(tokens):
            ids = torch.cat([ids, logits(teacher, ids, -1).argmax(-1)], 1)
    return str(teacher.tokenizer.decode(ids[0])).replace("\n", " ")


def directions_of(student: Student, teacher: Teacher, concepts: Sequence[str]) -> dict[str, Tensor]:
    """Centred vectors of each kind, ``[concepts, number, d_model]``; all as long as the true one."""
    told = student.config
    true = torch.from_numpy(read_texts(teacher, concepts, told["template"], told["layer"], told["pool"]) - student.mean)
    length = true.norm(dim=-1, keepdim=True)  # [concepts, 1]
    answer = torch.from_numpy(student.encode(concepts) - student.mean)
    draw = torch.randn(len(concepts), RANDOM, true.shape[1], generator=torch.Generator().manual_seed(0))
    return {
        "true vector": true[:, None],
        "student's vector": (length * answer / answer.norm(dim=-1, keepdim=True))[:, None],
        "random vector": length[:, None] * draw / draw.norm(dim=-1, keepdim=True),
    }


def measure(
    teacher: Teacher, layer: int, concepts: Sequence[str], directions: dict[str, Tensor]
) -> dict[str, dict[str, Floats]]:
    """By kind of vector the gain in preference and the divergence, ``[strengths, concepts]`` each."""
    found = {kind: {name: np.zeros((len(STRENGTHS), len(concepts)), np.float32) for name in MEASURES} for kind in KINDS}
    prompts = [list(teacher.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    sizes = [directions[kind].shape[1] for kind in KINDS]
    for place, concept in enumerate(tqdm(concepts, "steer", unit="concept")):
        words = list(teacher.tokenizer(f" {concept}")["input_ids"])
        own = torch.cat([directions[kind][place] for kind in KINDS])  # [all kinds, d_model]
        scaled = torch.cat([strength * own for strength in STRENGTHS])
        for prompt in prompts:
            said, moved = (values.view(len(STRENGTHS), -1) for values in effect(teacher, layer, prompt, words, scaled))
            for name, values in (("gain", said - said[0]), ("divergence", moved)):
                for kind, part in zip(KINDS, torch.split(values, sizes, 1), strict=True):
                    found[kind][name][:, place] += part.mean(1).numpy() / len(prompts)
    return found


def picture(found: dict[str, dict[str, Floats]], title: str, path: Path) -> None:
    """Both measures against the strength, with the standard error over concepts."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (measured, label) in zip(axes, MEASURES.items(), strict=True):
        for kind, color in zip(KINDS, ("tab:blue", "tab:orange", "tab:gray"), strict=True):
            values = found[kind][measured]
            error = values.std(1, ddof=1) / np.sqrt(values.shape[1])
            axis.errorbar(STRENGTHS, values.mean(1), error, label=kind, color=color, marker="o", capsize=3)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xlabel("strength")
        axis.set_title(label, fontsize=10)
    axes[0].legend()
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(found: dict[str, dict[str, Floats]], concepts: Sequence[str], strength: float) -> list[str]:
    """The gain of every concept at one strength, as Markdown."""
    row = STRENGTHS.index(strength)
    lines = [f"| concept | {' | '.join(KINDS)} |", "| --- |" + " --- |" * len(KINDS)]
    for place, concept in enumerate(concepts):
        gains = [f"{found[kind]['gain'][row, place]:+.2f}" for kind in KINDS]
        lines.append(f"| {concept} | {' | '.join(gains)} |")
    means = [f"{found[kind]['gain'][row].mean():+.2f}" for kind in KINDS]
    return [*lines, f"| **mean** | {' | '.join(means)} |"]


def main() -> None:
    """Read the options, measure, and show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student", help="a student folder (default: the newest in results/)")
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), help="whose directions to add")
    parser.add_argument("--output", default="results/steering.png", type=Path, help="the picture")
    options: Any = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    newest = sorted(Path("results").glob("*_student"), key=lambda path: path.stat().st_mtime)
    if options.student is None and not newest:
        parser.error("no student in results/; run make sweep first, or name one with --student")
    student = Student.load(options.student or newest[-1])
    layer = student.config["layer"]
    teacher = load_teacher(find_teacher(student.config["teacher"], "float32"))
    directions = directions_of(student, teacher, options.concepts)
    found = measure(teacher, layer, options.concepts, directions)
    lines = table(found, options.concepts, 1.0)
    log.info(
        "\ngain in log-probability of the concept's words at strength 1, block %d:\n\n%s\n", layer, "\n".join(lines)
    )
    for place, concept in enumerate(options.concepts[:3]):
        for kind in KINDS:
            said = generate(teacher, layer, PROMPTS[0], 1.5 * directions[kind][place, :1])
            log.info("%-14s %-17s %s", concept, kind, said)
    title = f"{student.config['teacher']}, block {layer}: {len(options.concepts)} concepts, {len(PROMPTS)} prompts"
    picture(found, title, options.output)
    log.info("\npicture: %s", options.output)


if __name__ == "__main__":
    main()
