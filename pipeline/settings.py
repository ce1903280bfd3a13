"""The options of every command: one frozen dataclass per command.

Its fields are the command-line options and the MLproject parameters, with their help texts; MLflow shows their values.
"""

from __future__ import annotations

import operator
import re
import sys
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from pipeline.errors import InputError


def option(default: Any, text: str, **rules: Any) -> Any:
    """A dataclass field that is also a command-line option, with its help text and its rules."""
    # Rules: bounds (`BOUNDS`); plain: letters, digits and "-_." only, for names in queries and file names; aliases:
    # further spellings; bare: the value of an option that is given without one.
    return field(default=default, metadata={"help": text} | rules)


EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
BOUNDS = {
    "minimum": (operator.ge, "at least"), "above": (operator.gt, "more than"), "below": (operator.lt, "less than"),
}  # fmt: skip


def flag(item: Field[Any]) -> str:
    """The option's spelling on the command line."""
    return "--" + item.name.replace("_", "-")


def check(settings: Any) -> None:
    """Check every value against the type and the bounds of its field.

    Raises:
        InputError: a value of another type, or out of bounds.
    """
    types = get_type_hints(type(settings))
    for item in fields(settings):
        value, kind = getattr(settings, item.name), types[item.name]
        optional = type(None) in get_args(kind)
        if optional and value is None:
            continue
        for basic, expected in EXPECTED.items():
            if basic in (get_args(kind) if optional else (kind,)) and not _is_a(value, basic):
                raise InputError(f"{flag(item)} {value!r}: expected {expected}")
        if item.metadata.get("plain") and not re.fullmatch(r"[\w.-]+", value):
            raise InputError(f"{flag(item)} {value!r}: expected letters, digits, '-', '_' and '.'")
        for name, (holds, words) in BOUNDS.items():
            if (bound := item.metadata.get(name)) is not None and not holds(value, bound):
                raise InputError(f"{flag(item)} {value}: expected {words} {bound}")


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


# fmt: off
DEVICE_MAP = "Spread a big teacher over devices: auto, balanced or sequential.  [default: one device]"
TRUST = "Run model code that comes with the weights; only if you trust its authors."
BENCHMARK = ("Also measure on data of others what is retained of the teacher's score: wordsim353, simlex999, men, "
    "simverb3500, rarewords, google-analogies, ap, bless, battig, concreteness, concreteness-phrases, sensorimotor, "
    "mcrae or ravel. Repeat the option for several, or put commas between them.")
BENCHMARK_DATA = ("Folder of the benchmarks' files.  [default: the cache, then what Python packages carry, then a "
    "download]")
TEACHER_DTYPE = "Precision of the teacher, as for extract.  [default: that of the vectors]"


@dataclass(frozen=True)
class ExtractOptions:
    """Run a teacher over the concepts and keep its activation vectors."""

    teacher: str = option("qwen3-1.7b", "The language model: a short name (qwen3-1.7b, gpt2, smollm2-135m, ...), a "
        "Hugging Face hub id, a local folder, or a .gguf file.", aliases=("--model",))
    concepts: tuple[str, ...] = option(("data/concepts.csv",), "CSV file with the columns concept,category; "
        "wordfreq:en:20000 for the most frequent words of a language; or a text file of one phrase a line. Repeat the "
        "option for several, or put commas between them.")
    judge: str | None = option(None, "The source whose validation and test concepts are held out; those of all others "
        "that share no word stem with these are for training.  [default: of several sources the first, if it is CSV]")
    language: str | None = option(None, "Language of the concepts (en, de, fr, ...): concepts that share a word stem "
        "are held out together.  [default: en, or that of wordfreq]")
    num_concepts: int | None = option(None, "Extract so many concepts, spread over the categories.  [default: all]",
        minimum=1)
    layers: str = option("mid", "Blocks after which to read: mid, all, or numbers such as 2,6,mid. 0 is the embedding "
        "output.")
    template: tuple[str, ...] = option(("Tell me about {concept}",), "The prompt around the concept; repeat the option "
        "for several.")
    pool: str = option("last", "Read the last token of the prompt, or the mean over the concept's tokens (last, mean).")
    token_block: int = option(1, "Also read every token of the concepts by itself after this early block: a table from "
        "which students read more than from the embeddings, without running the teacher. 0 reads the embedding output.",
        minimum=0)
    dtype: str = option("auto", "Precision of the teacher: float32, bfloat16, float16, int8 (8-bit weights, needs "
        "bitsandbytes); auto takes bfloat16 on CUDA for weights of 16 bits or fewer, else float32.")
    batch_tokens: int | None = option(None, "Tokens of a batch; halved when memory runs out.  [default: found from the "
        "device]", minimum=1)
    output: str | None = option(None, "Where to write.  [default: data/vectors/<teacher>.safetensors]")
    overwrite: bool = option(False, "Replace vectors of another request that stand at the output; those that come with "
        "the project stay.")
    check: str = option("auto", "First compare a few prompts with the untouched model's own pass, one at a time; where "
        "vectors differ, nothing is extracted: on (as --check alone), off, or auto: for families of models that the "
        "tests do not cover.", bare="on")
    shard: str = option("0/1", "The part i/n of the work, i from 0; the shard that finishes last merges.")
    merge: bool = option(False, "Read nothing, only join the parts that shards have left.")
    vocabulary: bool = option(True, "Also write the teacher's whole vocabulary, beside the vectors: with it students "
        "answer for any text.")
    device_map: str | None = option(None, DEVICE_MAP)
    trust_remote_code: bool = option(False, TRUST)


SHIPPED = "data/vectors/smollm2-135m.safetensors"
# Raised by hand when a change moves the results of cells, which a test of golden numbers notices; finished cells of
# another version are trained again.
RESULTS_VERSION = 2
SHORT_NAMES = {  # abbreviations of options in the names of cells
    "concepts": "c", "hidden_dim": "h", "layers": "l", "seed": "s", "student": "", "objective": "", "inputs": "",
    "skip": "skip", "temperature": "t", "targets": "targets-", "token_dropout": "td", "noise": "n", "mixup": "mix",
    "curriculum": "by-", "pace": "p", "split": "split-", "learning_rate": "lr", "weight_decay": "wd", "dropout": "d",
    "epochs": "e", "batch_size": "b", "evaluations": "evaluations-", "precision": "precision-",
}
ALL_CONCEPTS = sys.maxsize  # of a cell, until the vectors file says how many training concepts it has
SIZED = ("mlp", "transformer")  # students whose name always states their width and depth


@dataclass(frozen=True)
class Cell:
    """One student configuration of a grid. Every field can be an axis."""

    concepts: int = option(700, "Training concepts, a judge's before those of pools; smaller sets are contained "
        "in larger ones.", minimum=2)
    hidden_dim: int = option(256, "Width of the student's hidden layers.", minimum=1)
    layers: int = option(2, "Hidden layers (residual blocks) of the student.", minimum=0)
    student: str = option("mlp", "Kind of student: mlp, transformer, ridge, kernel or truncated.")
    objective: str = option("cosine", "What training minimises: cosine, mse, infonce, or a weighted sum such as "
        "cosine+0.1*infonce.")
    layer: int | None = option(None, "Block of the teacher whose vectors to learn.  [default: the middle one of the "
        "file]", minimum=0)
    epochs: int = option(100, "Passes over the training concepts.", minimum=1)
    seed: int = option(0, "Seed of initialisation, batch order and dropout.", minimum=0)
    batch_size: int = option(128, "Concepts of a training step at the most; all steps have about as many.", minimum=1)
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW (warm-up, then cosine decay).", above=0)
    weight_decay: float = option(0.1, "AdamW's decoupled weight decay.", minimum=0)
    dropout: float = option(0.4, "Share of inputs and of hidden units dropped in training; a batch shares its units, "
        "so they cost nothing.", minimum=0, below=1)
    inputs: str = option("activations", "What the student reads of a concept: activations (each of its tokens by "
        "itself after the teacher's first block, from the file's table), embeddings (their input embeddings; also "
        "embeddings-first, embeddings-whitened), ngrams (hashed characters), bag (learned embeddings), block<k>, or "
        "several joined by +.")
    blocks: int = option(2, "Early blocks of the teacher that a truncated student runs.", minimum=0)
    skip: bool = option(False, "Give an mlp a linear skip that starts as ridge regression.")
    temperature: float = option(0.3, "Temperature of infonce.", above=0)
    targets: str = option("first", "Templates to learn: first, their mean, or all of them as targets in turn.")
    token_dropout: float = option(0.0, "Share of a concept's tokens dropped in training.", minimum=0, below=1)
    noise: float = option(0.0, "Standard deviation of noise on the standardised inputs in training.", minimum=0)
    mixup: float = option(0.0, "Mix pairs of training concepts with weights from Beta(mixup, mixup).", minimum=0)
    curriculum: str = option("none", "Easy concepts first: none, frequency (of words), or ridge (its error).")
    pace: float = option(0.5, "Share of training after which a curriculum shows all concepts.", above=0)
    split: str = option("concepts", "What is held out: concepts, or whole categories.")
    evaluations: str = option("every", "Validate after every epoch, or after log-spaced ones: every, log.")
    patience: int | None = option(None, "Stop after so many epochs without a better validation cosine.  [default: "
        "never]", minimum=1)
    precision: str = option("auto", "Matrix products of training: float32, bfloat16, or auto: bfloat16 on CUDA, "
        "float32 elsewhere. They are 0.002 cosine apart at most.")

    def __post_init__(self) -> None:
        """Convert whole numbers in float fields, so that 0 and 0.0 are one cell with one name and key."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "float" and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, item.name, float(value))

    @property
    def configuration_name(self) -> str:
        """Short name without the seed, such as ``c700-h256-l2``; fields with their default are left out."""
        always = ("hidden_dim", "layers") if self.student in SIZED else ()
        values = {item.name: getattr(self, item.name) for item in fields(Cell)
                  if item.name in always or getattr(self, item.name) != item.default}
        values = {"concepts": self.concepts} | values
        values.pop("seed", None)
        if self.student == "truncated":
            values["student"] += str(values.pop("blocks", Cell.blocks))
        return "-".join(_name_part(name, value) for name, value in values.items())

    @property
    def name(self) -> str:
        """Short, unique name of the cell, such as ``c700-h256-l2-s0``."""
        return f"{self.configuration_name}-{_name_part('seed', self.seed)}"


def _name_part(option: str, value: object) -> str:
    text = "" if value is True else "off" if value is False else str(value).replace("*", "")
    return SHORT_NAMES.get(option, option.replace("_", "-")) + text


@dataclass(frozen=True)
class TrainOptions(Cell):
    """Train one student."""

    vectors: str = option(SHIPPED, "The vectors file: a path, s3://..., hf://datasets/owner/name, or "
        "runs:/<run id>/<artifact>.")
    output: str | None = option(None, "Folder for the student.  [default: results/<time>_student]")
    register: str | None = option(None, "Register the student in MLflow under this name, with the alias best.")
    report: bool = option(True, "Draw tables and plots at the end; the report command draws them later too.")
    resume: bool = option(True, "Take over a student that was trained before with the same settings and data.")
    device_map: str | None = option(None, DEVICE_MAP)
    trust_remote_code: bool = option(False, TRUST)


@dataclass(frozen=True)
class SweepOptions:
    """Train every cell of a grid."""

    grid: str = option("scaling", "A grid of pipeline/grids/ by name, or the path of a YAML file.")
    epochs: int | None = option(None, "Passes over the training concepts, for every cell.  [default: the grid's]",
        minimum=1)
    vectors: str | None = option(None, "The vectors file: a path, s3://..., hf://datasets/owner/name, or "
        f"runs:/<run id>/<artifact>.  [default: the grid's, or {SHIPPED}]")
    seeds: int | None = option(None, "Train each cell with so many seeds, counted up from the grid's.  [default: the "
        "grid's, or 1]", minimum=1)
    max_concepts: int | None = option(None, "Train only the cells with at most so many concepts.  [default: all cells]",
        minimum=2)
    sweep_id: str | None = option(None, "Name of the sweep; the same name goes on with the same parent run.  [default: "
        "from grid and data]", plain=True)
    output: str = option("results", "Folder for the results file, the plots and the best student.")
    benchmark: tuple[str, ...] = option((), BENCHMARK + "  [default: the grid's, where they are at hand]")
    benchmark_data: str | None = option(None, BENCHMARK_DATA)
    register: str | None = option(None, "Register the best student in MLflow under this name, with the alias best.")
    shard: str = option("0/1", "The part i/n of the cells, i from 0; the shard that completes the sweep reports.")
    report: bool = option(True, "Draw tables and plots at the end; the report command draws them later too.")
    resume: bool = option(True, "Skip cells that are finished already, with the same settings, data and version of the "
        "results.")
    dry_run: bool = option(False, "Train nothing; show the cells, how they are dealt out, and about how long it takes.")
    device_map: str | None = option(None, DEVICE_MAP)
    trust_remote_code: bool = option(False, TRUST)


@dataclass(frozen=True)
class ReportOptions:
    """Draw the tables and plots of a sweep."""

    results: str | None = option(None, "A results file.  [default: the newest in results/]")
    sweep_id: str | None = option(None, "A sweep in MLflow, instead of a results file.", plain=True)
    vectors: str | None = option(None, "The vectors file that the sweep was trained on.  [default: where the sweep had "
        "it, else the grid's]")
    predict: int | None = option(None, "Fit the scaling law on the cells with at most so many concepts, and write down "
        "what it expects of the larger ones of the grid; a later report shows how that fared.", minimum=2)
    output: str = option("results", "Folder for the tables and plots.")


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure trained students on the test concepts."""

    run: str | None = option(None, "A student folder, or an MLflow run: a cell's or a whole sweep's.  [default: newest "
        "sweep in results/]")
    teacher: str | None = option(None, "Also put the vectors into this teacher and compare what it says next "
        "(kl_recovered): a name as for extract. A teacher that is a folder or a file has to be named for benchmarks "
        "too.")
    dtype: str | None = option(None, TEACHER_DTYPE)
    device_map: str | None = option(None, DEVICE_MAP)
    trust_remote_code: bool = option(False, TRUST)
    benchmark: tuple[str, ...] = option((), BENCHMARK)
    benchmark_data: str | None = option(None, BENCHMARK_DATA)
    leave_out_overlap: bool = option(False, "Leave out a benchmark's items with a word whose stem a training concept "
        "has.")
    static: tuple[str, ...] = option((), "Compare with static vectors on the benchmarks: a folder of model2vec. Repeat "
        "the option for several.")
    vectors: str | None = option(None, "The vectors file that the students were trained on.  [default: where the sweep "
        "had it, else the grid's]")
    output: str = option("results", "Folder for the table and the JSON file.")


@dataclass(frozen=True)
class PredictOptions:
    """Ask a student for the vectors of any text."""

    run: str | None = option(None, "The student: a folder, s3://..., hf://owner/name, runs:/<run id>, or "
        "models:/<name>@<alias>.  [default: newest in results/]")
    file: str | None = option(None, "A file with a text a line, a .csv or .tsv file, or - for standard input; instead "
        "of texts as arguments.")
    column: str = option("concept", "The column of a .csv or .tsv file that holds the texts.")
    output: str | None = option(None, "Where to write: .safetensors, .npy, .csv or .jsonl.  [default: JSON lines on "
        "standard output, or with --nearest a table]")
    nearest: int | None = option(None, "Name so many concepts whose true vectors are nearest, beside the vectors in "
        "--output.", minimum=1)
    among: str | None = option(None, "Where to look for the nearest: a vectors file (.safetensors), or a list of "
        "phrases (text, .csv or .tsv, as for --file), which the student encodes.  [default: the student's own "
        "catalogue]")
    compare: bool = option(False, "Also run the teacher, and give the cosine of each vector with the true one.")
    teacher: str | None = option(None, "The teacher to compare with.  [default: the student's own]")
    dtype: str | None = option(None, TEACHER_DTYPE)
    device_map: str | None = option(None, DEVICE_MAP)
    trust_remote_code: bool = option(False, TRUST)


@dataclass(frozen=True)
class PushOptions:
    """Publish a student or a vectors file on the Hugging Face hub."""

    licence: str | None = option(None, "The teacher's licence, such as apache-2.0, where it is not known.",
        aliases=("--license",))
    private: bool = option(False, "Make a new repository private.")
