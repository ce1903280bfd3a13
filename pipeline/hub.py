"""The Hugging Face hub: downloads, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError, WorkError

SCHEME = "hf://"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


def cache() -> Path:
    """The folder of the hub's cache (``HF_HOME``)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


def cached_folder(model: str) -> Path | None:
    """The cached folder of a model's newest files, which may be incomplete; None where nothing is cached."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def show_bars() -> None:
    """Show progress bars of downloads."""
    from huggingface_hub.utils.tqdm import enable_progress_bars

    enable_progress_bars()


def fetch(place: str) -> Path:
    """Download ``hf://owner/name[@revision]``, a student, or ``hf://datasets/owner/name[@revision]/file``."""
    from huggingface_hub import hf_hub_download

    path = place.removeprefix(SCHEME)
    kind = "dataset" if path.startswith("datasets/") else "model"
    owner, _, rest = path.removeprefix("datasets/").partition("/")
    full_name, _, file = rest.partition("/")
    name, _, revision = full_name.partition("@")
    if not owner or not name or (kind == "dataset" and not file):
        raise InputError(f"{place}: expected hf://owner/name, or hf://datasets/owner/name/file")
    with translate_errors(place):
        paths = [
            Path(hf_hub_download(f"{owner}/{name}", part, repo_type=kind, revision=revision or None))
            for part in ([file] if file else FILES)
        ]
    return paths[0] if file else paths[0].parent


@contextmanager
def translate_errors(place: str) -> Iterator[None]:
    """Turn the hub's errors into ours: one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        advice = "not found, or not yours to see; check the name, and log in with: hf auth login"
        raise InputError(f"{place}: {advice}") from error
    except errors.HFValidationError as error:
        raise InputError(f"{place}: {error}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 404:
            advice = "has not all files of a student, or no such file"
            raise InputError(f"{place}: {advice} ({error.response.url})") from error
        if status in (401, 403):
            raise InputError(f"{place}: the hub refuses ({status}); log in with: hf auth login") from error
        raise WorkError(f"{place}: the hub answers {status}: {str(error).splitlines()[0]}") from error
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise WorkError(f"{place}: the hub does not answer ({str(error).splitlines()[0][:160]})") from error
