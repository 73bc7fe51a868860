"""The working folder of a run, which its processes share.

OUT.partial/
run.json  recipe.yaml       what the run was begun with
stage-1/checkpoint-200/     the running stage: what learns, optimiser, schedule, RNG, ...
finished/stage-1/           the model after the last stage that is over
result/                     on its way to OUT
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trol import files
from trol.checkpoints.adapter import numbers_digest, text_digest, weights_digest
from trol.errors import TrainingError, UsageError
from trol.host import processes, sharding
from trol.host.trainer import newest_checkpoint_in
from trol.training.recipe import Recipe

LOOKED_AT = 64
"""Number of rows, spread over a data set, whose content goes into its fingerprint."""

READ_WHOLE = 1 << 28
"""Files of at most so many bytes are read whole for the fingerprint of a data set."""

MAY_CHANGE = ("save_every", "keep")
"""Keys of a recipe that say nothing about what is learnt."""

DRAFTS = ".writing"
"""Name of the folder in which folders are filled before they get their place."""

RECIPE, RUN, WEIGHTS = "recipe.yaml", "run.json", "model.safetensors"
RESULTS, RANDOM = "found.json", "random.pt"
"""Names of the files."""


def data_fingerprint(rows: Any, collate: Callable[..., Mapping[str, Any]]) -> str:
    """A digest of a data set: its length, some of its rows, and the files of a mixture.

    Files are read whole where they are at most `READ_WHOLE` bytes together; of larger ones the
    sizes and where each row begins and ends are taken.
    """
    places = np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).round().astype(int)
    batch = collate([rows[int(place)] for place in places])
    parts = [str(len(rows)), *(f"{key}{_numbers(batch[key])}" for key in sorted(batch))]
    mixture = getattr(rows, "mixture", None)
    sources = () if mixture is None else mixture.parts
    small = sum(source.size for source in sources) <= READ_WHOLE
    for source in sources:
        columns = [source.index[name] for name in ("row", "start", "end")]
        parts += [_numbers(torch.from_numpy(column.copy())) for column in columns]
        if small:
            parts += [hashlib.sha256(p.read_bytes()).hexdigest() for p in source.container.files]
    return text_digest("\n".join(parts))


def _numbers(value: Any) -> str:
    return numbers_digest(value) if isinstance(value, Tensor) else repr(value)


def differences(before: str, now: Recipe) -> list[str]:
    """How a recipe written as YAML differs from another: `"seed was 0 and is 1"`."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(now.yaml()))
    keys = [key for key in {**old, **new} if key not in MAY_CHANGE]
    return _changes(keys, old, new, "not there")


def _changes(keys: Any, old: Mapping[str, Any], new: Mapping[str, Any], absent: Any) -> list[str]:
    both = [(key, old.get(key, absent), new.get(key, absent)) for key in keys]
    return [f"{key} was {was} and is {now}" for key, was, now in both if was != now]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Every value under its dotted key."""
    if not isinstance(tree, dict):
        return {path: tree}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= _flat(value, f"{path}.{key}" if path else str(key))
    return values


def random_state() -> dict[str, Any]:
    """The states of all random generators, in a form that `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - what libraries draw from
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Puts all random generators back to `state`."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def writing(what: str, place: Path) -> Generator[None]:
    """While open, an error in writing becomes a `TrainingError` that says what goes where."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{what} cannot be written into {place}: {error}. What was saved before is intact; "
            "make room and run again with --resume."
        ) from error


@contextmanager
def whole_folder(place: Path) -> Generator[Path]:
    """`trol.files.whole_folder`, filled in `DRAFTS`; all processes take part."""
    drafts, first = place.parent / DRAFTS, processes.is_first()
    try:
        with files.whole_folder(
            place, draft=drafts / place.name, first=first, wait=processes.wait
        ) as draft:
            yield draft
    finally:
        if first:
            shutil.rmtree(drafts, ignore_errors=True)


class WorkingFolder:
    """`OUT.partial`, beside the folder that the model will be in."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")

    @property
    def is_begun(self) -> bool:
        """Whether a run that can be gone on with lies here."""
        return (self.path / RUN).is_file()

    def refuse_to_forget(self) -> None:
        """Raises `UsageError` where a new run would throw away an unfinished one."""
        if self.is_begun:
            raise UsageError(
                f"{self.path} holds an unfinished run; give --resume to go on with it, or remove "
                "the folder to begin again."
            )

    def check(self, recipe: Recipe, begun: dict[str, Any]) -> None:
        """Raises `UsageError` where this is another run than the one that lies here."""
        changed = differences((self.path / RECIPE).read_text(encoding="utf-8"), recipe)
        before = {"sharded": False, **self._begun()}
        changed += _changes(begun, before, begun, None)
        if changed:
            raise UsageError(
                f"the run in {self.path} cannot be resumed as another one: {'; '.join(changed)}. "
                "Give what it was begun with, or another --out."
            )

    def begin(self, recipe: Recipe, begun: dict[str, Any], model: nn.Module) -> None:
        """Notes what the run begins with, or checks that the model is still the same."""
        mark = weights_digest(model)
        processes.wait()  # until all have looked whether there is a run
        if self.is_begun:
            if self._begun()["model"] != mark:
                raise UsageError(
                    f"the model that the run in {self.path} began with has changed; give the "
                    "same one, or another --out."
                )
        elif processes.is_first():
            shutil.rmtree(self.path, ignore_errors=True)
            noted = {**begun, "model": mark, "data": {}}
            self._note(RECIPE, recipe.yaml())
            self._note(RUN, json.dumps(noted, indent=2))
        processes.wait()

    def check_data(self, stage: str, mark: str) -> None:
        """Notes a stage's data, or raises `UsageError` where they are not what they were."""
        begun = self._begun()
        known = begun["data"].get(stage)
        if known not in (None, mark):
            raise UsageError(
                f"the data of stage {stage} have changed since the run in {self.path} saw them "
                f"(fingerprint {known}, now {mark}); put them back, or give another --out."
            )
        processes.wait()  # until all have read
        if known is None and processes.is_first():
            begun["data"][stage] = mark
            self._note(RUN, json.dumps(begun, indent=2))
        processes.wait()

    def stage(self, number: int) -> Path:
        """Where checkpoints of the stage go; stages count from 1."""
        return self.path / f"stage-{number}"

    def finish(self, number: int, model: nn.Module, results: dict[str, Any]) -> None:
        """Keeps the model as it is after stage `number`; older states and checkpoints go."""
        place = self.path / "finished" / f"stage-{number}"
        with writing(f"the model after stage {number}", self.path), whole_folder(place) as draft:
            if processes.is_first():
                save_file(state_of(model, _is_full), draft / WEIGHTS)
                torch.save(random_state(), draft / RANDOM)
                (draft / RESULTS).write_text(json.dumps(results), encoding="utf-8")
        if processes.is_first():
            shutil.rmtree(self.stage(number), ignore_errors=True)
            for old in place.parent.glob("stage-*"):
                if old != place:
                    shutil.rmtree(old, ignore_errors=True)
        processes.wait()

    def finished(self) -> int:
        """How many stages are over."""
        return max((int(p.name[6:]) for p in (self.path / "finished").glob("stage-*")), default=0)

    def restore(self, number: int, model: nn.Module) -> dict[str, Any]:
        """Puts model and random state back to the end of stage `number`; gives back its results."""
        place = self.path / "finished" / f"stage-{number}"
        put_state(model, _is_full, place / WEIGHTS)
        set_random_state(torch.load(place / RANDOM, weights_only=True))
        return json.loads((place / RESULTS).read_text(encoding="utf-8"))

    def deliver(self) -> None:
        """Moves `result` to where the model belongs, and removes the rest."""
        if self.out.exists():
            shutil.rmtree(self.path / "replaced", ignore_errors=True)
            self.out.replace(self.path / "replaced")
        (self.path / "result").replace(self.out)
        shutil.rmtree(self.path)

    def _note(self, name: str, text: str) -> None:
        with writing(name, self.path):
            files.write_whole(self.path / name, text)

    def _begun(self) -> dict[str, Any]:
        return json.loads((self.path / RUN).read_text(encoding="utf-8"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if there is one."""
    newest = newest_checkpoint_in(folder) if folder.is_dir() else None
    return None if newest is None else Path(newest)


def state_of(model: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> dict[str, Tensor]:
    """The parameters that `wanted` takes, each once, and the buffers that are saved with them.

    Of a sharded model, this process's share.
    """
    return {name: t.cpu().contiguous() for name, t in _live_state(model, wanted).items()}


@torch.no_grad()
def put_state(model: nn.Module, wanted: Callable[[nn.Parameter], bool], file: Path) -> None:
    """Puts a saved `state_of` into the model; `TrainingError` where it is another model's."""
    saved, known = load_file(file), _live_state(model, wanted)
    odd = set(saved) ^ set(known) or {n for n, t in known.items() if saved[n].shape != t.shape}
    if odd:
        raise TrainingError(f"{file} is not of this model: {', '.join(sorted(odd)[:4])} differ.")
    for name, tensor in known.items():
        tensor.copy_(saved[name])


def _live_state(model: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if wanted(p)}
    saved = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    return {n: sharding.own_share(t).detach() for n, t in {**parameters, **buffers}.items()}


def _is_full(parameter: nn.Parameter) -> bool:
    """Whether a parameter can have changed: quantised weights never do."""
    return parameter.is_floating_point()
