"""A Hub reference to a folder in the local cache: only the files that a merge needs, offline where they are cached."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..companions import is_companion
from ..errors import CheckpointError
from .json_file import INDEX_BYTES, INDEX_VALUES, read_json
from .remote_file import RemoteFile

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?|[A-Za-z0-9][\w.-]*@[\w./-]+")
Kinds = tuple[tuple[str, str], ...]  # names of weight files: whole, and the index of shards; the best first
MODEL = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTER = (("adapter_model.safetensors", ""), ("adapter_model.bin", ""))
BOTTLENECK = (("adapter.safetensors", ""), ("pytorch_adapter.bin", ""))  # of AdapterHub's library adapters
CARD = "README.md"
_NOTHING = ".nothing"  # a pattern that fits no file
_AT_ONCE = 8  # requests for headers
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

    with _explained(repository, revision):
        found = _listed(repository, revision)
        needed = _needed(repository, revision, found.names, kinds, also) if found is not None else None
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=needed))
        _add_card(folder, repository, found.names if found is not None else ())
        return folder


@dataclass(frozen=True)
class Glance:
    """A repository as far as it is here: the folder that holds it, and the headers of weights that are not there."""

    repository: str
    folder: Path
    missing: Mapping[str, RemoteFile]


def glance(repository: str, revision: str | None = None, kinds: Kinds = MODEL, also: tuple[str, ...] = ()) -> Glance:
    """Give what `download` would, but only the headers of `.safetensors` files that are not in the cache.

    Raises CheckpointError where it is unknown, gated, or neither cached nor reachable.
    """
    from huggingface_hub import hf_hub_url, snapshot_download, try_to_load_from_cache

    with _explained(repository, revision):
        found = _listed(repository, revision)
        if found is None or found.commit is None:  # the Hub cannot be asked: what is cached must do
            return Glance(repository, download(repository, revision, kinds, also), {})
        commit = found.commit
        needed = _needed(repository, commit, found.names, kinds, also)
        absent = [
            name
            for name in needed
            if name.endswith(".safetensors")
            and not isinstance(try_to_load_from_cache(repository, name, revision=commit), str)
        ]
        rest = [name for name in needed if name not in absent]
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=rest or [_NOTHING]))
        _add_card(folder, repository, found.names)

        def header(name: str) -> RemoteFile | CheckpointError:
            try:
                return RemoteFile(folder / name, f"{repository}/{name}", hf_hub_url(repository, name, revision=commit))
            except CheckpointError as error:
                return error

        with ThreadPoolExecutor(_AT_ONCE, "header") as pool:
            made = dict(zip(absent, pool.map(header, absent), strict=True))
    mistakes = [mistake for one in made.values() if isinstance(one, CheckpointError) for mistake in one.mistakes]
    if mistakes:
        raise CheckpointError.of(mistakes)
    return Glance(repository, folder, {name: one for name, one in made.items() if isinstance(one, RemoteFile)})


def fetched(
    reference: str, revision: str | None, kinds: Kinds = MODEL, also: tuple[str, ...] = (), *, weights: bool = True
) -> Glance:
    """Fetch the repository of a reference `ORG/NAME[@REVISION]`; with `weights=False` only the headers of its weights.

    A revision that is given beside the reference wins. Raises CheckpointError as `download` does.
    """
    repository, _, tag = reference.partition("@")
    commit = revision or tag or None
    if weights:
        return Glance(repository, download(repository, commit, kinds, also), {})
    return glance(repository, commit, kinds, also)


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into our own."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's, or httpx2's
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repository}@{revision}" if revision else repository
    try:
        yield
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


@dataclass(frozen=True)
class _Listing:
    """The files of a repository, and the commit; None where only the cache could tell."""

    names: list[str]
    commit: str | None


def _listed(repository: str, revision: str | None) -> _Listing | None:
    """List the files of a repository: on the Hub, or, where that cannot be asked, as the cache remembers them."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError  # type: ignore[attr-defined]

    try:
        found = huggingface_hub.HfApi().model_info(repository, revision=revision)
        return _Listing([sibling.rfilename for sibling in found.siblings or ()], found.sha)
    except RevisionNotFoundError:
        raise
    except (HTTPError, OSError):  # the download says why, if the cache cannot help
        pass
    try:
        return _Listing(
            [file.path for file in huggingface_hub.get_cached_repo_tree(repository, revision=revision)], None
        )
    except Exception:  # a huggingface_hub that keeps no list, or a cache that one has filled: then it is not checked
        return None


def _needed(repository: str, revision: str | None, names: list[str], kinds: Kinds, also: tuple[str, ...]) -> list[str]:
    """Choose the companions, and the weights: the shards of an index, one whole file, or else what there is."""
    from huggingface_hub import hf_hub_download

    companions = [name for name in names if is_companion(name) or name in also]
    for whole, index in kinds:
        if index in names:
            path = Path(hf_hub_download(repository, index, revision=revision))
            shards = read_json(path, INDEX_BYTES, INDEX_VALUES).get("weight_map")
            found = shards.values() if isinstance(shards, dict) else ()
            listed = set(names)
            return [*companions, index, *dict.fromkeys(one for one in found if isinstance(one, str) and one in listed)]
        if whole in names:
            return [*companions, whole]
    top = [name for name in names if "/" not in name and not NOT_WEIGHTS.fullmatch(name)]
    safe = [name for name in top if name.endswith(".safetensors")]
    return [*companions, *(safe or [name for name in top if name.endswith((".bin", ".pt", ".pth"))])]
