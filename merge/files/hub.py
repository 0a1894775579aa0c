"""A Hub reference to a folder in the local cache: only the files that a merge needs, offline where they are cached."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..companions import is_companion, read_json
from ..errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?|[A-Za-z0-9][\w.-]*@[\w./-]+")
Kinds = tuple[tuple[str, str], ...]  # names of weight files: whole, and the index of shards; the best first
MODEL = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTER = (("adapter_model.safetensors", ""), ("adapter_model.bin", ""))
BOTTLENECK = (("adapter.safetensors", ""), ("pytorch_adapter.bin", ""))  # of AdapterHub's library adapters
CARD = "README.md"
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form `ORG/NAME` or `ORG/NAME@REVISION`.

    >>> is_hub_id("org/model"), is_hub_id("org/model@3f2a"), is_hub_id("./org/model")
    (True, True, False)
    """
    return _ID.fullmatch(text) is not None


def is_on_hub(text: str, revision: str | None = None, folder: Path | None = None) -> bool:
    """Tell whether a text that names nothing in a folder stands for a repository.

    `models/mth` beside a folder `models` is a misspelt path, unless a revision says that a repository is meant.
    """
    beside = ((folder or Path()) / text.partition("/")[0]).is_dir()
    return is_hub_id(text) and (not beside or revision is not None or "@" in text)


def download(repository: str, revision: str | None = None, kinds: Kinds = MODEL, also: tuple[str, ...] = ()) -> Path:
    """Give the folder of a repository at a revision, downloaded into huggingface_hub's cache or found there.

    It holds the companions, the best of the kinds of weights, and of the files in `also` those that there are.

    Raises CheckpointError where it is unknown, gated, or neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's, or httpx2's
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repository}@{revision}" if revision else repository
    try:
        names = _listed(repository, revision)
        needed = None if names is None else _needed(repository, revision, names, kinds)
        if needed is not None and names is not None:
            needed += [name for name in also if name in names]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=needed))
        _add_card(folder, repository, names or ())
        return folder
    except LocalEntryNotFoundError as error:
        hint = "check the network, or download it first on a machine that has one: hf download " + repository
        raise CheckpointError(where, "not in the local cache, and the Hub cannot be reached", hint) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; a private or gated model needs `hf auth login`; a folder is written ./NAME"
        raise CheckpointError(where, "no such model on the Hub, or no right to read it", hint) from error
    except RevisionNotFoundError as error:
        hint = "a revision is a branch, a tag or a whole commit hash"
        raise CheckpointError(where, f"the model has no revision {revision!r}", hint) from error
    except (HTTPError, HFValidationError, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(where, f"cannot be downloaded ({first})", "try again later") from error


def _add_card(folder: Path, repository: str, names: Sequence[str]) -> None:
    """Download the model card too, which says the licence; a model is whole without it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError  # type: ignore[attr-defined]

    if CARD in names and not (folder / CARD).exists():
        with suppress(EntryNotFoundError, HTTPError, OSError):
            hf_hub_download(repository, CARD, revision=folder.name)


def _listed(repository: str, revision: str | None) -> list[str] | None:
    """List the files of a repository: on the Hub, or, where that cannot be asked, as the cache remembers them."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError  # type: ignore[attr-defined]

    try:
        found = huggingface_hub.HfApi().model_info(repository, revision=revision)
        return [sibling.rfilename for sibling in found.siblings or ()]
    except RevisionNotFoundError:
        raise
    except (HTTPError, OSError):  # the download says why, if the cache cannot help
        pass
    try:
        return [file.path for file in huggingface_hub.get_cached_repo_tree(repository, revision=revision)]
    except Exception:  # a huggingface_hub that keeps no list, or a cache that one has filled: then it is not checked
        return None


def _needed(repository: str, revision: str | None, names: list[str], kinds: Kinds) -> list[str]:
    """Choose the companions, and the weights: the shards of an index, one whole file, or else what there is."""
    from huggingface_hub import hf_hub_download

    companions = [name for name in names if is_companion(name)]
    for whole, index in kinds:
        if index in names:
            shards = read_json(Path(hf_hub_download(repository, index, revision=revision))).get("weight_map")
            found = shards.values() if isinstance(shards, dict) else ()
            return [*companions, index, *dict.fromkeys(name for name in found if name in names)]
        if whole in names:
            return [*companions, whole]
    top = [name for name in names if "/" not in name and not NOT_WEIGHTS.fullmatch(name)]
    safe = [name for name in top if name.endswith(".safetensors")]
    return [*companions, *(safe or [name for name in top if name.endswith((".bin", ".pt", ".pth"))])]
