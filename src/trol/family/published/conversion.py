"""Converting a published checkpoint into a plain TroL folder, one file of weights after the other.

The folder carries a marker, and no `config.json`, until everything in it has been compared with its
source, so nothing opens a half-made one. The marker says which conversion has the folder: one that
was broken off goes on where it was (finished files are compared and kept), and no other may. No
more than one file of weights is in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trol.errors import DataError, HostError, UsageError
from trol.family.configuration import TrolConfig
from trol.family.loading import SHIPPED
from trol.family.modeling import TrolForConditionalGeneration
from trol.family.processing import TrolProcessor
from trol.family.published.files import CONFIG, GATING, MARKER, Checkpoint, check_source
from trol.family.published.layouts import Weights
from trol.family.published.opening import Published, find_published
from trol.family.published.processors import published_processor
from trol.files import write_json

FINISHED = "conversion.json"
"""What `MARKER` is called when the conversion is finished."""

PARTIAL = ".partial"
"""Ends the names of files that are not whole, or not compared yet."""

SHARD_BYTES = 2 * 10**9
"""Most bytes of weights in a file, and so in memory while it is written."""

SPARE_BYTES = 50 * 10**6
"""For everything but the weights: tokenizer, configurations."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done to which of how many files: (doing, number, of)."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    source: str
    destination: str
    family: str
    """"internlm2" or "phi3"."""
    sharing: str
    """"shared" or "per_layer" gates."""
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    """Of weights."""
    files: int
    """Weight files."""
    kept: int
    """Weight files that an earlier, broken-off conversion had finished."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda doing, number, of: None,
) -> Converted:
    """Writes `source` to `destination` as a TroL folder; opens that and compares it bit by bit.

    Args:
        source: folder or hub name of a published checkpoint; it is only read.
        destination: a folder that is new, empty, or an unfinished conversion of the same source.
        dtype: of the weights; None for the checkpoint's own.
        shard_bytes: most bytes of weights in one file.
        progress: called for each file.

    Raises:
        UsageError: the source is neither folder nor hub name; or the destination is not one of
            these, is finished already, lies within the source, or cannot be made.
        DataError: the source is damaged, the disk is too small, or the comparison fails.
        HostError: the source is no published checkpoint.
    """
    folder = Path(destination)
    _check_places(source, destination)
    published = _published(source)
    _check_apart(published.folder, folder)
    config, weights = published.config, published.weights
    config.dtype = dtype = dtype or cast(torch.dtype, config.dtype)
    config.architectures = [TrolForConditionalGeneration.__name__]
    with torch.device("meta"):  # shapes without values
        model: Any = TrolForConditionalGeneration(config)
        model.to(dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in weights}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    # All that can be wrong with the source is noticed before anything is written.
    processor = published_processor(TrolProcessor, published.folder, config)
    published.set_stops(model.generation_config)
    lock(folder, manifest(published.checkpoint, dtype, shard_bytes))
    files = {
        file: {name: tensors[name] for name in names}
        for file, names in split.filename_to_tensors.items()
    }
    kept = _write_weights(folder, files, weights, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    _write_rest(folder, config, processor, model)
    progress("comparing", len(files), len(files))
    _compare(folder, weights, tensors)
    (folder / (CONFIG + PARTIAL)).replace(folder / CONFIG)
    (folder / MARKER).replace(folder / FINISHED)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Converted(
        source=published.source,
        destination=str(folder),
        family=published.family,
        sharing=config.depth["sharing"],
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(tensors),
        parameters=size // dtype.itemsize,
        bytes=size,
        files=len(files),
        kept=kept,
    )


def _published(source: str | Path) -> Published:
    published = find_published(source)
    if published is None:
        expected = (CONFIG, GATING) if Path(source).is_dir() else ()
        missing = [name for name in expected if not (Path(source) / name).is_file()]
        here = f" (missing here: {', '.join(missing)})" if missing else ""
        raise HostError(
            f"{str(source)!r} is no published TroL checkpoint, whose weights lie beside {CONFIG} "
            f"and {GATING}{here}; a saved TroL model needs no conversion, trol.load_model opens it."
        )
    return published


def _check_places(source: str | Path, destination: str | Path) -> None:
    """`UsageError` for a source or destination that can be refused without opening the source."""
    if str(source) in SHIPPED:
        raise UsageError(
            f"{source!r} is a model that trol ships, which needs no conversion; open it by its "
            "name, with trol chat or trol.load_model."
        )
    check_source(source)
    folder = Path(destination)
    if Path(source).is_dir():
        _check_apart(Path(source), folder)
    if not str(destination).strip():
        raise UsageError("the destination is empty; give the name of a new folder.")
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; give the name of a new folder.")
        locked = any((folder / name).is_file() for name in (MARKER, FINISHED))
        if not locked and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; give a new folder, or empty this one.")
    except OSError as error:
        raise _no_place(folder, error) from error


def _check_apart(source: Path, folder: Path) -> None:
    """`UsageError` for a destination within its source."""
    inner, outer = folder.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise UsageError(
            f"{folder} lies within {source}, which is only read; give a folder elsewhere."
        )


def _no_place(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{folder} cannot be made or written to ({error.strerror or error}); give a folder in a "
        "place that exists and where you may write."
    )


def manifest(checkpoint: Checkpoint, dtype: torch.dtype, shard_bytes: int) -> dict[str, Any]:
    """What tells conversions apart: all that the files of weights depend on, and nothing else.

    A tokenizer may be mended meanwhile; weights of the same size are compared value by value.
    """
    gating = checkpoint.folder / GATING
    files = [*checkpoint.files(), *([gating] if gating.is_file() else [])]
    return {
        "sizes": {file.name: file.stat().st_size for file in files},
        "config": sha256((checkpoint.folder / CONFIG).read_bytes()).hexdigest(),
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
    }


def lock(folder: Path, own: dict[str, Any]) -> None:
    """Reserves the folder for the conversion of this manifest, by `MARKER`.

    Raises:
        UsageError: another conversion has it, this one is finished already, or it cannot be made.
    """
    if (folder / FINISHED).is_file() and (folder / CONFIG).is_file():
        if _read_manifest(folder / FINISHED) == own:
            raise UsageError(
                f"{folder} is already there and finished, made of these same files with the same "
                f"settings; there is nothing to do. Next: trol chat {folder}"
            )
        raise UsageError(
            f"{folder} holds a finished conversion of other files, or with other settings; give a "
            "new folder, or empty this one."
        )
    if (folder / MARKER).is_file():
        if _read_manifest(folder / MARKER) != own:
            raise UsageError(
                f"{folder} holds an unfinished conversion of other files, or with other settings, "
                "than these; go on with those, or empty the folder."
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER, own)
    except OSError as error:
        raise _no_place(folder, error) from error


def _read_manifest(file: Path) -> Any:
    """What such a file says; None where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None


Shapes = dict[str, Tensor]
"""Names of weights, with tensors without values that have their shapes and type."""


def _write_weights(
    folder: Path, files: dict[str, Shapes], weights: Weights, progress: Progress
) -> int:
    """Writes the files of weights that are not there yet; returns how many were there."""
    kept = set()
    for number, (file, tensors) in enumerate(files.items(), 1):
        if (folder / file).exists():
            progress("checking", number, len(files))
            if _holds(folder / file, tensors, weights):
                kept.add(file)
    missing = [tensors for file, tensors in files.items() if file not in kept]
    _check_space(folder, sum(tensor.nbytes for group in missing for tensor in group.values()))
    for number, (file, tensors) in enumerate(files.items(), 1):
        if file not in kept:
            progress("writing", number, len(files))
            _write(folder / file, dict(_copies(weights, tensors)))
    return len(kept)


def _check_space(folder: Path, size: int) -> None:
    needed, free = size + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} needs {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB "
            "free; make room or convert to another disk. Finished files stay and are kept."
        )


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one file of weights, whole or not at all; `DataError` where the disk refuses."""
    partial = file.with_name(file.name + PARTIAL)
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(file)
    except SafetensorError as error:
        raise DataError(
            f"{file} cannot be written ({error}); once that is mended, the same command goes on "
            "where it was."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _holds(file: Path, tensors: Shapes, weights: Weights) -> bool:
    """Whether the file holds these weights and no others, equal to their source to the last bit."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys()) == set(tensors) and all(
                same_bits(opened.get_tensor(name), tensor)
                for name, tensor in _copies(weights, tensors)
            )
    except SafetensorError:  # cut off: it is written again
        return False


def _copies(weights: Weights, tensors: Shapes) -> Iterator[tuple[str, Tensor]]:
    """These weights one by one, in the type of `tensors`, each in memory of its own."""
    for name, tensor in tensors.items():
        yield name, weights[name][...].to(tensor.dtype, copy=True).contiguous()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _write_rest(
    folder: Path, config: TrolConfig, processor: TrolProcessor, model: TrolForConditionalGeneration
) -> None:
    """Processor, generation settings, and the configuration under its partial name."""
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config.to_json_file(folder / (CONFIG + PARTIAL))


def _compare(folder: Path, weights: Weights, tensors: Shapes) -> None:
    """Opens what was written as a user would, and compares every weight with its source."""
    config = TrolConfig.from_pretrained(folder / (CONFIG + PARTIAL))
    opened: Any = TrolForConditionalGeneration.from_pretrained(
        folder, config=config, output_loading_info=True
    )
    model, report = opened
    TrolProcessor.from_pretrained(folder)
    state = model.state_dict()
    wrong = sorted({name for names in report.values() for name in names})
    wrong += [n for n, tensor in _copies(weights, tensors) if not same_bits(state[n], tensor)]
    if wrong:
        raise DataError(
            f"{folder}, opened anew, is not what was converted: {len(wrong)} weights differ, first "
            f"{wrong[0]!r}; empty the folder and convert again."
        )
