"""Publishing a finished folder on the Hub: checked as far as it can be before any work, and done in one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError

RECEIPT = "portmanteau.json"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOG_IN = "`hf auth login`, or the variable HF_TOKEN; https://huggingface.co/settings/tokens makes one that may write"
_AGAIN = "try again later; what is built already goes up with: portmanteau push OUT ORG/NAME"
_MAY_WRITE = ("admin", "write", "contributor")


@dataclass(frozen=True)
class Target:
    """A repository of the Hub to publish in: ORG/NAME, and whether it is to be public."""

    repository: str
    public: bool = False


def check_target(target: Target, *, force: bool = False) -> None:
    """Check, before any work, that a folder can be published there; nothing is made or changed.

    Raises OutputError without a token, without the right to write there, for what others have published there, and
    where the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    where = target.repository
    if not _ID.fullmatch(where):
        raise OutputError(where, "is no name of a repository", "write ORG/NAME, such as my-name/swahili-math")
    if constants.HF_HUB_OFFLINE:
        raise OutputError(where, "cannot be published offline", "unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise OutputError(where, "there is no token for the Hub", f"log in first: {_LOG_IN}")
    api = HfApi()
    _check_rights(where, _asked(where, api.whoami))
    found = _existing(api, where)
    if found is None:
        return
    if not found.private and not target.public:
        raise OutputError(where, "is public already", "add --public if the result is to be, or choose another name")
    names = {sibling.rfilename for sibling in found.siblings or ()} - {".gitattributes"}
    if names and RECEIPT not in names and not force:
        hint = "choose another name, or replace its files with --force; the Hub's history keeps them"
        raise OutputError(where, "holds what portmanteau did not build", hint)


def upload(folder: Path, target: Target) -> str:
    """Publish a folder in one commit that takes the place of what was there; give its address.

    Raises OutputError where it is no result of a build, or where the Hub refuses it.
    """
    from huggingface_hub import HfApi

    if not (folder / RECEIPT).is_file():
        hint = f"a folder that `build` made holds {RECEIPT}"
        raise OutputError(str(folder), "was not built by portmanteau", hint)
    api, where = HfApi(), target.repository
    made = _asked(where, api.create_repo, where, private=not target.public, exist_ok=True)
    message = "Publish a merge built by portmanteau"
    _asked(where, api.upload_folder, repo_id=where, folder_path=folder, commit_message=message, delete_patterns="*")
    return str(made)


def _check_rights(where: str, me: dict[str, Any]) -> None:
    """Look whether the token may write in the namespace, as far as the Hub tells."""
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise OutputError(where, "the token may only read", f"log in with one that may write: {_LOG_IN}")
    namespace, _, _ = where.partition("/")
    roles = {one.get("name"): one.get("roleInOrg") for one in me.get("orgs", ())}
    if namespace != me.get("name") and roles.get(namespace, "none") not in (*_MAY_WRITE, None):
        mine = ", ".join([str(me.get("name")), *(name for name, one in roles.items() if one in (*_MAY_WRITE, None))])
        raise OutputError(where, f"the token has no right to write in {namespace}", f"it may write in: {mine}")


def _existing(api: Any, where: str) -> Any:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return _asked(where, api.model_info, where)
    except OutputError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return None
        raise


def _asked(where: str, ask: Any, *arguments: Any, **named: Any) -> Any:
    """Ask the Hub. Raises OutputError that says why it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # HTTPError: httpx's

    try:
        return ask(*arguments, **named)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = error.server_message or next(iter(str(error).splitlines()), "")
        if status == 401:
            raise OutputError(where, "the Hub does not accept the token", f"log in anew: {_LOG_IN}") from error
        if status == 403:
            raise OutputError(where, f"the Hub refuses: {said}", f"the token lacks a right: {_LOG_IN}") from error
        raise OutputError(
            where, f"the Hub answers {status}: {said}", "try again later: portmanteau push OUT ORG/NAME"
        ) from error
    except (RuntimeError, ValueError) as error:  # of huggingface_hub itself: a file that did not arrive, a card refused
        raise OutputError(where, f"cannot be published: {error}", _AGAIN) from error
    except (HTTPError, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutputError(where, f"the Hub cannot be reached ({first})", "check the network") from error
