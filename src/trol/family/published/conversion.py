"""Converting a published checkpoint into a plain TroL folder, shard by shard.

The folder carries a marker, and no `config.json`, until everything in it has been compared with its
source, so that nothing opens a half-made one. A conversion that was broken off goes on where it
was: finished shards are compared and kept.

`claims` says whose folder it is.

Whose a conversion's folder is: one's own to go on with, finished, or somebody else's.

Weights in files of bounded size, each written whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trol.errors import DataError, HostError, UsageError
from trol.family.configuration import TrolConfig
from trol.family.loading import SHIPPED
from trol.family.modeling import TrolForConditionalGeneration
from trol.family.processing import TrolProcessor
from trol.family.published.files import CONFIG, GATING, MARKER, Checkpoint, check_source
from trol.family.published.opening import Published, Weights, find_published
from trol.family.published.processors import published_processor

FINISHED = "conversion.json"
"""What `MARKER` is called when the conversion is finished."""


def manifest(checkpoint: Checkpoint, dtype: torch.dtype, shard_bytes: int) -> dict[str, Any]:
    """What tells conversions apart: all that the shards depend on, and nothing else.

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


def check_destination(destination: str | Path) -> None:
    """`UsageError` for a place where no conversion can go, whatever its source."""
    folder = Path(destination)
    if not str(destination).strip():
        raise UsageError("the destination is empty; give the name of a new folder.")
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; give the name of a new folder.")
        ours = any((folder / name).is_file() for name in (MARKER, FINISHED))
        if not ours and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; give a new folder, or empty this one.")
    except OSError as error:
        raise _no_place(folder, error) from error


def check_apart(source: Path, folder: Path) -> None:
    """`UsageError` for a destination within its source."""
    inner, outer = folder.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise UsageError(
            f"{folder} lies within {source}, which is only read; give a folder elsewhere."
        )


def claim(folder: Path, made_of: dict[str, Any]) -> None:
    """Makes the folder ours; `UsageError` where another conversion has it, or this one is done."""
    if (folder / FINISHED).is_file() and (folder / CONFIG).is_file():
        if _read(folder / FINISHED) == made_of:
            raise UsageError(
                f"{folder} is already there and finished, made of these same files with the same "
                f"settings; there is nothing to do. Next: trol chat {folder}"
            )
        raise UsageError(
            f"{folder} holds a finished conversion of other files, or with other settings; give a "
            "new folder, or empty this one."
        )
    if (folder / MARKER).is_file():
        if _read(folder / MARKER) != made_of:
            raise UsageError(
                f"{folder} holds an unfinished conversion of other files, or with other settings, "
                "than these; go on with those, or empty the folder."
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER, made_of)
    except OSError as error:
        raise _no_place(folder, error) from error


def finish(folder: Path) -> None:
    """Says that the conversion is finished; call it when everything is written and compared."""
    (folder / MARKER).replace(folder / FINISHED)


def _read(file: Path) -> Any:
    """What such a file says; None where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _no_place(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{folder} cannot be made or written to ({error.strerror or error}); give a folder in a "
        "place that exists and where you may write."
    )


PARTIAL = ".partial"
"""Ends the names of files that are not yet what their name says."""


@dataclass(frozen=True)
class Shard:
    """A file of weights, and which lie in it."""

    file: str
    names: list[str]
    size: int
    """Bytes of its weights."""


def planned(shapes: Mapping[str, torch.Size], dtype: torch.dtype, most: int) -> list[Shard]:
    """The weights, in order, dealt out to files of at most `most` bytes (or of one weight)."""
    parts: list[tuple[list[str], int]] = []
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if not parts or parts[-1][1] + size > most:
            parts.append(([], 0))
        parts[-1] = ([*parts[-1][0], name], parts[-1][1] + size)
    of = len(parts)
    files = [f"model-{i:05}-of-{of:05}" for i in range(1, of + 1)] if of > 1 else ["model"]
    return [
        Shard(f"{file}.safetensors", names, size)
        for file, (names, size) in zip(files, parts, strict=True)
    ]


def write(folder: Path, shard: Shard, weights: Weights, dtype: torch.dtype) -> None:
    """Reads and writes one shard; `DataError` where the disk refuses."""
    tensors = dict(cast_to(weights, shard.names, dtype))
    try:
        with whole(folder / shard.file) as path:
            save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DataError(
            f"{folder / shard.file} cannot be written ({error}); once that is mended, the same "
            "command goes on where it was."
        ) from error


def holds(folder: Path, shard: Shard, weights: Weights, dtype: torch.dtype) -> bool:
    """Whether the shard lies in the folder already, equal to its source to the last bit."""
    if not (folder / shard.file).is_file():
        return False
    try:
        with safe_open(folder / shard.file, framework="pt") as opened:
            return set(opened.keys()) == set(shard.names) and all(
                same_bits(opened.get_tensor(name), tensor)
                for name, tensor in cast_to(weights, shard.names, dtype)
            )
    except SafetensorError:  # cut off: it is written again
        return False


def write_index(folder: Path, shards: list[Shard]) -> None:
    """Says which shard holds which weight, where there are several."""
    if len(shards) > 1:
        listed = {name: shard.file for shard in shards for name in shard.names}
        size = {"total_size": sum(shard.size for shard in shards)}
        index = {"metadata": size, "weight_map": listed}
        write_json(folder / "model.safetensors.index.json", index)


def cast_to(weights: Weights, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """These weights one by one, each in memory of its own."""
    for name in names:
        yield name, weights[name][...].to(dtype, copy=True).contiguous()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write to; the file takes its own when the block ends well."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


SHARD_BYTES = 2 * 10**9
"""Most bytes of weights in a file, and so in memory while it is written."""

SPARE_BYTES = 50 * 10**6
"""For everything but the weights: tokenizer, configurations."""

Progress = Callable[[str, int, int], None]
"""Told what is being done to which of how many shards: (doing, number, of)."""


@dataclass(frozen=True)
class Converted:
    """What a conversion made."""

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
        progress: told about each shard.

    Raises:
        UsageError: the source is neither folder nor hub name; or the destination is not one of
            these, is finished already, lies within the source, or cannot be made.
        DataError: the source is damaged, the disk is too small, or the comparison fails.
        HostError: the source is no published checkpoint.
    """
    folder = _free(source, destination)
    published = _found(source)
    check_apart(published.folder, folder)
    config, weights = published.config, published.weights
    config.dtype = dtype = dtype or cast(torch.dtype, config.dtype)
    model = _without_memory(config)
    shapes = {name: made.shape for name, made in model.state_dict().items() if name in weights}
    plan = planned(shapes, dtype, shard_bytes)
    # All that can be wrong with the source is found before anything is written.
    processor = published_processor(published.folder, config)
    published.stop_with(model.generation_config)
    claim(folder, manifest(published.checkpoint, dtype, shard_bytes))
    kept = _write_shards(folder, plan, published, dtype, progress)
    _write_rest(folder, config, processor, model)
    progress("comparing", len(plan), len(plan))
    _compare(folder, published, plan, dtype)
    (folder / (CONFIG + PARTIAL)).replace(folder / CONFIG)
    finish(folder)
    return _summary(folder, published, plan, dtype, kept)


def _summary(
    folder: Path, published: Published, plan: list[Shard], dtype: torch.dtype, kept: int
) -> Converted:
    size = sum(shard.size for shard in plan)
    return Converted(
        source=published.source,
        destination=str(folder),
        family=published.family,
        sharing=published.config.depth["sharing"],
        dtype=str(dtype).removeprefix("torch."),
        tensors=sum(len(shard.names) for shard in plan),
        parameters=size // dtype.itemsize,
        bytes=size,
        files=len(plan),
        kept=kept,
    )


def _free(source: str | Path, destination: str | Path) -> Path:
    """The destination, as far as it can be judged without opening the source."""
    if str(source) in SHIPPED:
        raise UsageError(
            f"{source!r} is a model that trol ships, which needs no conversion; open it by its "
            "name, with trol chat or trol.load_model."
        )
    check_source(source)
    if Path(source).is_dir():
        check_apart(Path(source), Path(destination))
    check_destination(destination)
    return Path(destination)


def _found(source: str | Path) -> Published:
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


def _without_memory(config: TrolConfig) -> TrolForConditionalGeneration:
    """The model's shapes, without values."""
    config.architectures = [TrolForConditionalGeneration.__name__]
    with torch.device("meta"):
        return TrolForConditionalGeneration(config)


def _write_shards(
    folder: Path, plan: list[Shard], published: Published, dtype: torch.dtype, progress: Progress
) -> int:
    """Writes the shards that are not there yet, and the index; how many were there."""
    kept, weights = set(), published.weights
    for number, shard in enumerate(plan, 1):
        if (folder / shard.file).exists():
            progress("checking", number, len(plan))
            if holds(folder, shard, weights, dtype):
                kept.add(shard.file)
    _check_space(folder, [shard for shard in plan if shard.file not in kept])
    for number, shard in enumerate(plan, 1):
        if shard.file not in kept:
            progress("writing", number, len(plan))
            write(folder, shard, weights, dtype)
    write_index(folder, plan)
    return len(kept)


def _check_space(folder: Path, missing: list[Shard]) -> None:
    needed = sum(shard.size for shard in missing) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} needs {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB "
            "free; make room or convert to another disk. Finished files stay and are kept."
        )


def _write_rest(
    folder: Path, config: TrolConfig, processor: TrolProcessor, model: TrolForConditionalGeneration
) -> None:
    """Processor, generation settings, and the configuration under its partial name."""
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config.to_json_file(folder / (CONFIG + PARTIAL))


def _compare(folder: Path, published: Published, plan: list[Shard], dtype: torch.dtype) -> None:
    """Opens what was written as anyone would, and compares every weight with its source."""
    config = TrolConfig.from_pretrained(folder / (CONFIG + PARTIAL))
    opened: Any = TrolForConditionalGeneration.from_pretrained(
        folder, config=config, output_loading_info=True
    )
    model, report = opened
    TrolProcessor.from_pretrained(folder)
    wrong = sorted({name for names in report.values() for name in names})
    state = model.state_dict()
    for shard in plan:
        for name, tensor in cast_to(published.weights, shard.names, dtype):
            if not same_bits(state[name], tensor):
                wrong.append(name)
    if wrong:
        raise DataError(
            f"{folder}, opened anew, is not what was converted: {len(wrong)} weights differ, first "
            f"{wrong[0]!r}; empty the folder and convert again."
        )
