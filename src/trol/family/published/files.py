"""The files of a published checkpoint: which tensor lies where, read only when asked for.

What names a model: a folder, or owner/name on the hub; everything else is refused at once.

What a checkpoint's `config.json` states, and the image token's id in its tokenizer's files.

What the values in a checkpoint's `config.json` must be: kinds of values, by their keys.
"""

from __future__ import annotations

import ctypes
import json
import math
import pickle
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.activations import ACT2FN

from trol.errors import DataError, UsageError

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
        self._held: dict[str, tuple[Path, Any]] = {}
        self._read = 0
        index, files = _weight_files(self.folder)
        listed = {} if index is None else _weight_map(index)
        for file in files:
            self._held |= {name: (file, tensor) for name, tensor in _tensors(file).items()}
        for name, file in listed.items():
            if name not in self._held or self._held[name][0].name != file:
                raise DataError(
                    f"{index} says that {name!r} lies in {file}, which does not hold it; {CURE}."
                )

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._held)

    def files(self) -> list[Path]:
        """All weight files."""
        return sorted({file for file, _ in self._held.values()})

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
        self._read += tensor.nbytes
        if self._read > BYTES_BETWEEN_TRIMS:
            self._read = 0
            trim_memory()
        return tensor

    def _entry(self, name: str) -> tuple[Path, Any]:
        if name not in self._held:
            files = ", ".join(file.name for file in self.files())
            raise DataError(
                f"{self.folder} lacks the tensor {name!r}: it is in none of {files}; {CURE}."
            )
        return self._held[name]


def trim_memory() -> None:
    """Gives memory that is free in this process back to the operating system, where it can be.

    Quantising leaves small results between large freed inputs; glibc then keeps the latter's pages,
    up to more than the whole checkpoint's size.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


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


def _weight_map(index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise DataError(f'{index} has no "weight_map" of tensors to files; {CURE}.')
    return listed


def _weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index, if there is one, and the weight files, of the first kind that is there."""
    for kind, stem in STEMS.items():
        index = folder / f"{stem}{kind}.index.json"
        if index.is_file():
            return index, _indexed(index)
        if found := sorted(folder.glob(f"{stem}*{kind}")):
            return None, found
    kinds = " or ".join(f"{stem}*{kind}" for kind, stem in STEMS.items())
    raise DataError(f"{folder} has no weight files ({kinds}); give the folder that has them.")


def _indexed(index: Path) -> list[Path]:
    listed = _weight_map(index)
    files = [index.with_name(name) for name in sorted(set(listed.values()))]
    for file in files:
        if not file.is_file():
            missing = [tensor for tensor, name in listed.items() if name == file.name]
            raise DataError(
                f"{file} is missing: the index puts {len(missing)} tensors there, such as "
                f"{missing[0]!r}; {CURE}."
            )
    return files


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of one file by name, or what reads one when `[...]` is asked of it."""
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


class Kind(NamedTuple):
    """A kind of value, in words for errors, and whether a value is of it."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(map(_is_id, value)))


def _is_factors(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(one) and one > 0 for one in value)


COUNT = Kind("a whole number above 0", lambda value: _is_id(value) and value > 0)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
ID = Kind("a whole number from 0", _is_id)
IDS = Kind("a whole number from 0, or a list of them", _is_ids)
FACTORS = Kind("a list of numbers above 0", _is_factors)
ACTIVATION = Kind(
    "an activation that transformers knows, such as 'silu'",
    lambda value: isinstance(value, str) and value in ACT2FN,
)

KINDS = {
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), COUNT),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window"), COUNT),
    **dict.fromkeys(("img_size", "image_size", "force_image_size"), COUNT),
    **dict.fromkeys(("rope_theta", "factor", "rms_norm_eps", "layer_norm_eps"), POSITIVE),
    **dict.fromkeys(("initializer_range", "lora_alpha", "downsample_ratio"), POSITIVE),
    **dict.fromkeys(("lora_dropout", "attention_dropout", "embd_pdrop", "resid_pdrop"), SHARE),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ID),
    **dict.fromkeys(("image_token_index", "img_context_token_id"), ID),
    **dict.fromkeys(("short_factor", "long_factor"), FACTORS),
    "eos_token_id": IDS,
    "hidden_act": ACTIVATION,
}
"""By key; what has none here is compared with the tensors, or checked where it is read."""


IMAGE_TOKEN = "<IMG_CONTEXT>"
"""Phi-3's image token; InternLM2's has the id after its vocabulary, and no name."""


ADDED, DECODER = "added_tokens", "added_tokens_decoder"
"""Keys of the added tokens in tokenizer.json and in tokenizer_config.json."""


class Stated:
    """What `config.json`, or a part of it, states; `place` names it in errors.

    Null counts as not stated. What is stated must be of its key's kind (`KINDS`), or else reading
    it raises `DataError`.
    """

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, dict):
            raise DataError(f"{place} is {values!r}, not an object; {CURE}.")
        self._values, self.place = values, place

    def part(self, name: str) -> Stated:
        """What a part states; nothing where it is left out."""
        return Stated(self.get(name, default={}), f"{self.place}: {name}")

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these that is stated."""
        return next(iter(self.take(*names).values()), default)

    def need(self, name: str) -> Any:
        """What must be stated; `DataError` where it is not."""
        found = self.get(name)
        if found is None:
            raise DataError(f"{self.place} does not state {name!r}; {CURE}.")
        return found

    def agree(self, **found: Any) -> dict[str, Any]:
        """What the tensors tell; `DataError` where it is stated otherwise."""
        for name, value in found.items():
            if self.get(name, default=value) != value:
                raise DataError(
                    f"{self.place} states {name} {self.get(name)!r}, but the tensors are made for "
                    f"{value!r}; {CURE}."
                )
        return found

    def take(self, *names: str) -> dict[str, Any]:
        """Those of these that are stated."""
        found = {name: self._values[name] for name in names if self._values.get(name) is not None}
        for name, value in found.items():
            if name in KINDS and not KINDS[name].holds(value):
                raise DataError(
                    f"{self.place} states {name} {value!r}, expected {KINDS[name].words}; {CURE}."
                )
        return found


def image_token_id(stated: Stated, folder: Path, vocab: int) -> int:
    """The id of `IMAGE_TOKEN`, as stated, or else as the tokenizer's files have it."""
    found = stated.get("image_token_index", "img_context_token_id", default=None)
    if found is None:
        found = added_tokens(folder).get(IMAGE_TOKEN)
    if found is None or not 0 <= found < vocab:
        raise DataError(
            f"the tokenizer in {folder} gives the image token {IMAGE_TOKEN!r} the id {found}, "
            f"expected one of the {vocab} in the token table; put the checkpoint's own tokenizer "
            "files (tokenizer.json, added_tokens.json, tokenizer_config.json) beside its weights."
        )
    return found


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beyond the trained vocabulary, from whichever of the tokenizer's files has them."""
    tokens: dict[str, int] = {}
    if (file := folder / "tokenizer.json").is_file():
        tokens |= _listed(file, lambda whole: [(e["content"], e["id"]) for e in whole[ADDED]])
    if (file := folder / "tokenizer_config.json").is_file():
        tokens |= _listed(
            file, lambda whole: [(e["content"], i) for i, e in whole.get(DECODER, {}).items()]
        )
    if (file := folder / "added_tokens.json").is_file():
        tokens |= _listed(file, lambda whole: list(whole.items()))
    return tokens


def _listed(file: Path, pairs: Callable[[dict[str, Any]], list[Any]]) -> dict[str, int]:
    """Tokens and ids from a file of the tokenizer; `DataError` where it lists them otherwise."""
    try:
        return {token: int(number) for token, number in pairs(read_json(file))}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} does not list its added tokens as tokenizers do ({error!r}); {CURE}."
        ) from error


def end_token(folder: Path) -> str | None:
    """The tokenizer's end token, which its settings give as text or with its flags."""
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    stated = read_json(file).get("eos_token")
    return stated.get("content") if isinstance(stated, dict) else stated
