"""A teacher's tokenizer: loaded, known by its files, and compared with the embeddings that its tokens look up."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pipeline import hub
from pipeline.errors import InputError
from pipeline.teachers.files import LFS_POINTER, short_hash

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (TOKENIZER_JSON, "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")
OTHER_FILES = ("merges.txt", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenization*.py")
READERS = {"*.model": "sentencepiece", "*.tiktoken": "tiktoken", "tekken.json": "mistral_common"}  # Python packages
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # which read tokenizer.json unchanged
NOT_OF_LIBRARIES = (KeyboardInterrupt, SystemExit, MemoryError)
PROBE = "Tell me about the sea, 1 2 3: é Я 中"  # every tokenizer knows some of it
MIN_FILLED = 0.75  # of the embeddings' rows; vocabularies padded to a round number leave a seventh unused at the most

log = logging.getLogger(__name__)


def hash_tokenizer(folder: Path) -> str:
    """Hash of the files of a folder that decide how texts become tokens; "" where it has none."""
    files = {file for pattern in (*VOCABULARIES, *OTHER_FILES) for file in folder.glob(pattern) if file.is_file()}
    content = b""
    for file in sorted(files):
        own = file.read_bytes()
        if file.name == TOKENIZER_CONFIG:
            with suppress(ValueError):  # loading complains of it
                own = _without_chat_template(own)
        content += file.name.encode() + b"\0" + hashlib.sha256(own).digest()
    return short_hash(content) if files else ""


def _without_chat_template(content: bytes) -> bytes:
    settings = json.loads(content)
    if isinstance(settings, dict):
        settings.pop("chat_template", None)
    return json.dumps(settings, sort_keys=True).encode()


def load_tokenizer(
    name: str, location: str, config: PreTrainedConfig, options: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """Load a teacher's tokenizer from a folder or hub id, with the options of `transformers`.

    Returns:
        A tokenizer with character offsets.

    Raises:
        InputError: files that are missing, damaged or do not belong together, a package that is not installed, or a
            tokenizer without character offsets.
        OSError: the hub cannot be reached.
    """
    packed = options.get("gguf_file")
    local = Path(location) if Path(location).is_dir() else None
    folder = None if packed else local or hub.cached_folder(location)
    cause: BaseException | None = None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, config=config, **options)
        fault = _fault_of(tokenizer, folder)
        if not fault:
            return tokenizer
        fault = (folder and _fault_in(folder, None)) or fault
    except BaseException as error:  # panics of the tokenizers library are no Exceptions
        if isinstance(error, NOT_OF_LIBRARIES):
            raise
        found = folder and _fault_in(folder, error)
        if "trust_remote_code" in str(error) or (isinstance(error, OSError) and not found):
            raise
        fault, cause = found or _brief(error), error
    if packed:
        remedy = "name a file with the model's own in it"
    elif local:
        remedy = "put the model's own tokenizer there"
    else:
        remedy = "remove that folder to fetch it from the hub again, or name a local one with the model's own tokenizer"
    place = folder or Path(location, packed or "")
    raise InputError(f"--teacher {name}: the tokenizer in {place} cannot be used: {fault}; {remedy}") from cause


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Compare a teacher's tokenizer with its embedding table, and log what it appends to prompts.

    Tokens that were added later may lack a row (a padding token, say): only texts that have them are refused.

    Raises:
        InputError: the tokenizer is another model's.
    """
    backend: Any = tokenizer
    own = max(backend.backend_tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    sizes = f"its tokenizer has {max(own, len(backend)):,} tokens and its embedding table {rows:,} rows"
    if own > rows:
        raise InputError(f"--teacher {name}: {sizes}, so they are of two models; give it the tokenizer of its own")
    if len(backend) < MIN_FILLED * rows:
        log.warning("warning: --teacher %s: %s; is the tokenizer that of another model?", name, sizes)
    [(ids, _)] = encode(tokenizer, [PROBE])
    if appended := tokenizer([PROBE])["input_ids"][0][len(ids) :]:
        ending = " ".join(backend.convert_ids_to_tokens(appended))
        log.info("teacher %s: its tokenizer ends prompts with %s, which is left out", name, ending)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenize texts, with the tokens that the tokenizer puts before them, without those that it appends.

    A causal model reads appended tokens (an end token, say) last, so no other position changes.

    Returns:
        For each text its token ids and their spans of characters, empty for tokens that are not in the text.

    Raises:
        InputError: a text that the tokenizer cannot read.
    """
    try:
        encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    except Exception as error:  # the type that the tokenizers library raises
        if isinstance(error, NOT_OF_LIBRARIES):
            raise
        raise InputError(f"the teacher's tokenizer cannot read a text: {_brief(error)}") from error
    found = []
    columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
    for ids, spans, added in zip(*columns, strict=True):
        stop = len(ids)
        while stop and added[stop - 1] and spans[stop - 1][0] == spans[stop - 1][1]:
            stop -= 1
        found.append((list(ids[:stop]), list(spans[:stop])))
    return found


def _brief(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _fault_of(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> str | None:
    """What is wrong with a loaded tokenizer, or None."""
    backend: Any = tokenizer
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        return f"{kind} gives no character offsets (not a fast tokenizer, which has a {TOKENIZER_JSON})"
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if not ids:  # transformers makes an empty tokenizer where it finds no vocabulary
        return f"{kind} gives a text no token"
    most = max(map(ids.count, ids))  # of the unknown token, in a tokenizer that knows little
    if most == len(ids):
        return f"{kind} knows no word"
    path = folder / TOKENIZER_JSON if folder else None
    if 2 * most > len(ids) and path and path.is_file():
        model, read = type(Tokenizer.from_file(str(path)).model), type(backend.backend_tokenizer.model)
        if model is not read:
            return f"{path.name} is {model.__name__}, and {kind} of {TOKENIZER_CONFIG} reads it as {read.__name__}"
    return None


def _fault_in(folder: Path, error: BaseException | None) -> str | None:
    """What is wrong with a folder's tokenizer files, which failed to load with an error; None if nothing is seen."""
    for name in (TOKENIZER_CONFIG, TOKENIZER_JSON, "vocab.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists() and (fault := _fault_in_json(folder / name)):
            return f"{name} is {fault}"
    path, settings_path = folder / TOKENIZER_JSON, folder / TOKENIZER_CONFIG
    settings = json.loads(settings_path.read_bytes()) if settings_path.is_file() else {}
    kind = settings.get("tokenizer_class")
    if "auto_map" in settings:
        return None
    if not path.is_file():
        return _fault_in_older_files(folder, kind, error)
    try:
        Tokenizer.from_file(str(path))
    except BaseException as own:
        if isinstance(own, NOT_OF_LIBRARIES):
            raise
        version = f"tokenizers {tokenizers.__version__}"
        return f"{TOKENIZER_JSON} is no tokenizer, or of a newer version than {version} reads ({_brief(own)})"
    if error is None:
        return None
    named = "" if kind in (None, *GENERIC_CLASSES) else f"tokenizer_class {kind!r} in {TOKENIZER_CONFIG} with "
    return f"{named}{TOKENIZER_JSON} does not work ({_brief(error)})"


def _fault_in_json(path: Path) -> str | None:
    if not path.is_file():
        return "not a file"
    content = path.read_bytes()
    if not content.strip():
        return "empty"
    if content.startswith(LFS_POINTER):
        return "a pointer of Git LFS, to be replaced by the file with git lfs pull"
    try:
        return None if isinstance(json.loads(content), dict) else "no JSON object"
    except (ValueError, RecursionError) as error:
        return f"cut short or no JSON ({_brief(error)})"


def _fault_in_older_files(folder: Path, kind: object, error: BaseException | None) -> str | None:
    """What is wrong with the files of a folder without ``tokenizer.json``; ``kind`` is the class that settings name."""
    found = {pattern: sorted(folder.glob(pattern)) for pattern in VOCABULARIES}
    if not any(found.values()):
        alike = sorted({path.name for path in folder.glob("*token*.json")} - set(OTHER_FILES))
        return f"no {TOKENIZER_JSON}" + (f" ({', '.join(alike[:3])} has another name: is it that?)" if alike else "")
    for pattern, package in READERS.items():
        if found[pattern] and importlib.util.find_spec(package) is None:
            needs = f"needs the {package} package (pip install {package})"
            return f"{found[pattern][0].name} {needs} or a {TOKENIZER_JSON} beside it"
    if found["vocab.json"] and not (folder / "merges.txt").is_file():
        return "vocab.json has no merges.txt beside it"
    names = ", ".join(path.name for paths in [*found.values(), sorted(folder.glob("merges.txt"))] for path in paths)
    if found["*.model"]:
        return f"{found['*.model'][0].name} is damaged, or no SentencePiece model" if error else None
    if not kind:
        return f"no {TOKENIZER_JSON}, and no tokenizer_class in {TOKENIZER_CONFIG} that says how to read {names}"
    return f"{kind} does not read {names} ({_brief(error)})" if error else None
