"""Files from the Hugging Face hub, or from its local cache where the hub is out of reach."""

from __future__ import annotations

from pathlib import Path

_SMALL = ["*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "chat_templates/*"]
_WEIGHTS = ["model.safetensors", "model-*.safetensors"]
_TIMEOUT_SECONDS = 5


def fetch_small_files(repo: str) -> Path:
    """Configuration, tokenizer and the index of the weights; not the weights."""
    return _snapshot(repo, _SMALL)


def fetch_weights(repo: str) -> Path:
    """The safetensors beside the small files."""
    return _snapshot(repo, _SMALL + _WEIGHTS)


def _snapshot(repo: str, patterns: list[str]) -> Path:
    """Directory with the newest version if the hub answers in time, else the cached one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    problem = _unreachable(repo)
    try:
        directory = snapshot_download(
            repo,
            allow_patterns=patterns,
            local_files_only=problem is not None,
            etag_timeout=_TIMEOUT_SECONDS,
        )
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{repo!r} is neither a path nor in the local hub cache, and the hub is out of reach "
            f"({problem or error})"
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"{repo!r}: {_first_line(error)}") from error
    if not (Path(directory) / "config.json").exists():
        raise ValueError(f"{repo!r} has no config.json (a hub id must name a safetensors model)")
    return Path(directory)


def _unreachable(repo: str) -> str | None:
    """Why the hub does not answer, or None. A repository it does not have is a ValueError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(repo, timeout=_TIMEOUT_SECONDS)
    except GatedRepoError:
        return "access to it is restricted: accept its terms and log in with `hf auth login`"
    except RepositoryNotFoundError:
        return "it does not exist there, or is private"
    except Exception as error:  # the client library of the hub's client differs by version
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
