"""Converting a published checkpoint into a plain TroL folder, shard by shard.

The folder carries a marker, and no `config.json`, until everything in it has been compared with its
source, so that nothing opens a half-made one. A conversion that was broken off goes on where it
was: finished shards are compared and kept.

`claims` says whose folder it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from trol.errors import DataError, HostError, UsageError
from trol.family.configuration import TrolConfig
from trol.family.loading import SHIPPED
from trol.family.modeling import TrolForConditionalGeneration
from trol.family.processing import TrolProcessor
from trol.family.published import shards
from trol.family.published.claims import check_apart, check_destination, claim, finish, manifest
from trol.family.published.files import CONFIG, GATING
from trol.family.published.naming import check_source
from trol.family.published.opening import Published, find_published
from trol.family.published.processors import published_processor
from trol.family.published.shards import PARTIAL, Shard

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
    plan = shards.planned(shapes, dtype, shard_bytes)
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
            if shards.holds(folder, shard, weights, dtype):
                kept.add(shard.file)
    _check_space(folder, [shard for shard in plan if shard.file not in kept])
    for number, shard in enumerate(plan, 1):
        if shard.file not in kept:
            progress("writing", number, len(plan))
            shards.write(folder, shard, weights, dtype)
    shards.write_index(folder, plan)
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
        for name, tensor in shards.cast(published.weights, shard.names, dtype):
            if not shards.same_bits(state[name], tensor):
                wrong.append(name)
    if wrong:
        raise DataError(
            f"{folder}, opened anew, is not what was converted: {len(wrong)} weights differ, first "
            f"{wrong[0]!r}; empty the folder and convert again."
        )
