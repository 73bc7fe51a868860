"""What names a model: a folder, or owner/name on the hub; everything else is refused at once."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whichever library it asks with
    OfflineModeIsEnabled,
)

from trol.errors import UsageError
from trol.family.published.files import CONFIG

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_source(source: str | Path, shipped: tuple[str, ...] = ()) -> None:
    """`UsageError` for what is neither a folder here nor can be a hub name.

    Args:
        source: what was given as a model's name; it is none of `shipped`.
        shipped: models that could have been meant.
    """
    name, path = str(source), Path(source)
    if not name.strip():
        raise UsageError("the name of the model is empty; give a folder or a hub name.")
    if path.is_dir():
        return
    if path.exists():
        raise UsageError(f"{name} is a file; give the folder that holds the model.")
    if _HUB_NAME.fullmatch(name) is None:
        close = get_close_matches(name, shipped, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = f", or a shipped model ({', '.join(shipped)})" if shipped else ""
        raise UsageError(
            f"unknown model {name!r}: there is no such folder here, and it is no hub name, which "
            f"is owner/name.{hint} Give an existing folder or a hub name{known}."
        )


def unreachable(name: str, hub: dict[str, Any]) -> str | None:
    """Why the hub cannot be asked for a name, by one attempt; None where it answers, however.

    Fetching itself would try for half a minute, and say each time that it failed.
    """
    if hub.get("local_files_only"):
        return "only local files are to be used"
    address = hf_hub_url(name, CONFIG, revision=hub.get("revision"))
    try:
        get_hf_file_metadata(address, token=hub.get("token"))
    except (HTTPError, OfflineModeIsEnabled) as error:
        return None if isinstance(error, HfHubHTTPError) else str(error)
    return None
