"""A Hub reference to a folder in the local cache: only the files that a merge needs, offline where they are cached."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?|[A-Za-z0-9][\w.-]*@[\w./-]+")
COMPANION_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken", "LICENSE*", "chat_templates/*")


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form `ORG/NAME` or `ORG/NAME@REVISION`.

    >>> is_hub_id("org/model"), is_hub_id("org/model@3f2a"), is_hub_id("./org/model")
    (True, True, False)
    """
    return _ID.fullmatch(text) is not None


def download(repository: str, revision: str | None = None) -> Path:
    """Give the folder of a repository at a revision, downloaded into huggingface_hub's cache or found there.

    Raises CheckpointError where it is unknown, gated, or neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = f"{repository}@{revision}" if revision else repository
    try:
        weights = _weight_patterns(repository, revision)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*weights, *COMPANION_PATTERNS]))
    except LocalEntryNotFoundError as error:
        hint = "check the network, or download it first on a machine that has one: hf download " + repository
        raise CheckpointError(where, "not in the local cache, and the Hub cannot be reached", hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; a private or gated model needs `hf auth login`; a folder is written ./NAME"
        raise CheckpointError(where, "no such model on the Hub, or no right to read it", hint) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(where, f"cannot be downloaded ({str(error).splitlines()[0]})") from error


def _weight_patterns(repository: str, revision: str | None) -> list[str]:
    """Name the weight files that are needed: those of the index, one whole file, or else what there is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        names = HfApi().list_repo_files(repository, revision=revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError):
        return ["*.safetensors", "*.bin"]  # offline: snapshot_download serves what the cache holds, or says why not
    for whole, shards in (
        ("model.safetensors", "model-*-of-*.safetensors"),
        ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    ):
        if f"{whole}.index.json" in names:
            return [shards]
        if whole in names:
            return [whole]
    top = [name for name in names if "/" not in name]
    return [n for n in top if n.endswith(".safetensors")] or [n for n in top if n.endswith((".bin", ".pt", ".pth"))]
