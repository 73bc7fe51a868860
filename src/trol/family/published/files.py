"""The files of a published checkpoint: their names, their tensors, read on demand, and their JSON.

Also what can name a checkpoint (a folder, or owner/name on the hub), and the tokens that its
tokenizer's files add to the vocabulary.
"""

import json
import pickle
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trol.errors import DataError, UsageError
from trol.family.memory import trim_memory

STEMS = {".safetensors": "model", ".bin": "pytorch_model"}
"""Kind of weight file -> what transformers calls such files."""

GATING = "trol_gating.pt"
"""The file of the gates, beside the weights."""

CONFIG = "config.json"

MARKER = "unfinished_conversion.json"
"""Lies in a folder while a checkpoint is converted into it, and says which."""

BYTES_BETWEEN_TRIMS = 32 * 2**20

CURE = "download the files again from where the checkpoint was published"


class Checkpoint:
    """The tensors of a folder's weight files by name.

    A value is a view of its file, which the operating system reads page by page and drops again:
    reading takes no memory of its own.

    Raises:
        DataError: there are no weight files, one is missing or damaged, or the index does not fit.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._entries: dict[str, tuple[Path, Any]] = {}
        self._bytes_read = 0
        index, weight_map, files = _weight_files(self.folder)
        for file in files:
            self._entries |= {name: (file, tensor) for name, tensor in _tensors(file).items()}
        for name, file in weight_map.items():
            if name not in self._entries or self._entries[name][0].name != file:
                raise DataError(
                    f"{index} says that {name!r} lies in {file}, which does not hold it; {CURE}."
                )

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._entries)

    def files(self) -> list[Path]:
        """All weight files."""
        return sorted({file for file, _ in self._entries.values()})

    def file(self, name: str) -> Path:
        """Where a tensor lies."""
        return self._entry(name)[0]

    def shape(self, name: str) -> list[int]:
        """A tensor's shape; its values are not read."""
        tensor = self._entry(name)[1]
        return list(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor, lying in its file."""
        tensor = self._entry(name)[1][...]
        self._bytes_read += tensor.nbytes
        if self._bytes_read > BYTES_BETWEEN_TRIMS:
            self._bytes_read = 0
            trim_memory()
        return tensor

    def _entry(self, name: str) -> tuple[Path, Any]:
        if name not in self._entries:
            files = ", ".join(file.name for file in self.files())
            raise DataError(
                f"{self.folder} lacks the tensor {name!r}: it is in none of {files}; {CURE}."
            )
        return self._entries[name]


def _weight_files(folder: Path) -> tuple[Path | None, dict[str, str], list[Path]]:
    """Index and its map of tensors to files, if there is one, and the weight files of that kind."""
    for kind, stem in STEMS.items():
        index = folder / f"{stem}{kind}.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
            return index, weight_map, [folder / name for name in sorted(set(weight_map.values()))]
        if files := sorted(folder.glob(f"{stem}*{kind}")):
            return None, {}, files
    kinds = " or ".join(f"{stem}*{kind}" for kind, stem in STEMS.items())
    raise DataError(f"{folder} has no weight files ({kinds}); give the folder that has them.")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f'{index} has no "weight_map" of tensors to files; {CURE}.')
    for file in sorted(set(weight_map.values())):
        if not index.with_name(file).is_file():
            missing = [tensor for tensor, name in weight_map.items() if name == file]
            raise DataError(
                f"{index.with_name(file)} is missing: the index puts {len(missing)} tensors there, "
                f"such as {missing[0]!r}; {CURE}."
            )
    return weight_map


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of one file by name, or objects that read one when `[...]` is asked of them."""
    if file.suffix != ".safetensors":
        return read_pickled(file)
    try:
        opened = safe_open(file, framework="pt")
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} is damaged: {file.stat().st_size} bytes that are no whole safetensors file "
            f"({error}); {CURE}."
        ) from error


def read_pickled(file: Path, *, mmap: bool = True) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pt` file; `DataError` where it is damaged or holds code."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load the file without this check.
        raise DataError(
            f"{file} is no plain file of tensors: it holds other objects, or code, and was not "
            f"opened; {CURE}."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        raise DataError(
            f"{file} is damaged: {file.stat().st_size} bytes that are no whole file of tensors; "
            f"{CURE}."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise DataError(f"{file} holds other things than tensors by name; {CURE}.")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `DataError` for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; {CURE}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}); {CURE}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not an object; {CURE}.")
    return content


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
        raise UsageError(f"{name} is a file; give the folder that holds the model, or a GGUF file.")
    if _HUB_NAME.fullmatch(name) is None:
        close = get_close_matches(name, shipped, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = f", or a name that trol knows ({', '.join(shipped)})" if shipped else ""
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


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beyond the trained vocabulary, from whichever of the tokenizer's files has them."""
    tokens: dict[str, int] = {}
    for name, pairs in _ADDED.items():
        if not (file := folder / name).is_file():
            continue
        try:
            tokens |= {token: int(number) for token, number in pairs(read_json(file))}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} does not list its added tokens as tokenizers do ({error!r}); {CURE}."
            ) from error
    return tokens


_ADDED: dict[str, Callable[[dict[str, Any]], list[tuple[str, Any]]]] = {
    "tokenizer.json": lambda whole: [(e["content"], e["id"]) for e in whole["added_tokens"]],
    "tokenizer_config.json": lambda whole: [
        (e["content"], number) for number, e in whole.get("added_tokens_decoder", {}).items()
    ],
    "added_tokens.json": lambda whole: list(whole.items()),
}
"""File of a tokenizer -> the pairs of token and id in it; later files count more."""


def end_token(folder: Path) -> str | None:
    """The tokenizer's end token, which its settings give as text or with its flags."""
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    token = read_json(file).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token
