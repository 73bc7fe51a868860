"""`trol info`: what is installed here, what trol assumes of it, and what it makes of a model."""

from pathlib import Path
from typing import Annotated, Any

from trol.cli import models, terminal
from trol.cli.terminal import argument, commit, machine, versions
from trol.errors import HostError

EXAMPLES = (
    "trol info",
    "trol info trol-tiny",
    "trol info --json > info.json",
)


def info(
    model: Annotated[str | None, argument("[MODEL]", terminal.MODEL_IS)] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Show versions and assumptions, or what trol makes of MODEL."""
    with terminal.quiet_libraries():
        result = _collect() if model is None else _described(model)
    text = _text if model is None else _model_text
    terminal.report(result, as_json=as_json, text=lambda: text(result))
    failed = [one for one in result.get("assumptions", []) if one["found"] is not None]
    if failed:
        raise HostError(
            f"{len(failed)} of the assumptions above do not hold; this trol is not for "
            f"transformers {result['versions']['transformers']}."
        )


def _collect() -> dict[str, Any]:
    import torch
    from transformers import logging

    from trol.depth.policy import names
    from trol.host.assumptions import ASSUMPTIONS
    from trol.host.layers import FAMILY_NOTES

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what looking at transformers makes it log is no message
    assumptions = [
        {"name": one.name, "used_by": one.used_by, "found": one.finding()} for one in ASSUMPTIONS
    ]
    logging.set_verbosity(verbosity)
    return {
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "default_model": terminal.DEFAULT_MODEL,
        "policies": list(names()),
        "hosts": {
            kind: {
                name: getattr(note, kind)
                for name, note in FAMILY_NOTES.items()
                if getattr(note, kind)
            }
            for kind in ("refused", "no_second_visit", "no_holes")
        },
        "assumptions": assumptions,
    }


def _described(name: str) -> dict[str, Any]:
    from trol.checkpoints.adapter import is_trained
    from trol.family.loading import load_host
    from trol.family.pretrained import origin
    from trol.reports.description import describe

    model = models.open_model(name)[0] if is_trained(Path(name)) else load_host(name)
    dtype = str(model.dtype).removeprefix("torch.")
    where = {"model": name, "folder": model.name_or_path, "weights": origin(name, model)}
    return {**where, "dtype": dtype, **describe(model)}


def _text(result: dict[str, Any]) -> str:
    lines: list[tuple[str, str]] = list(result["versions"].items())
    lines += [(name, str(result[name])) for name in ("commit", "machine", "device", "threads")]
    lines.append(("model", result["default_model"]))
    lines.append(("policies", ", ".join(result["policies"])))
    lines.append(("hosts", "any transformers decoder that is not refused below, or by its probe"))
    for kind, families in result["hosts"].items():
        lines += [(f"{kind.replace('_', ' ')}: {name}", why) for name, why in families.items()]
    for one in result["assumptions"]:
        if one["found"] is None:
            lines.append(("assumes", one["name"]))
        else:
            lines += [("ASSUMES WRONGLY", one["name"]), ("  found", one["found"])]
            lines.append(("  used by", one["used_by"]))
    return _aligned(lines)


MODEL_KEYS = (
    "model",
    "folder",
    "weights",
    "dtype",
    "class",
    "family",
    "layers",
    "hidden_size",
    "parameters",
)
MODEL_KEYS += ("attention", "cache_layers", "policy")


def _model_text(result: dict[str, Any]) -> str:
    lines = [(name, _plain(result.get(name))) for name in MODEL_KEYS]
    visit = result.get("visit") or {}
    lines += [(f"a visit: {name}", _plain(flops or "not known")) for name, flops in visit.items()]
    lines += [(f"refused: {what}", why) for what, why in result["refused"].items()]
    return _aligned(lines if result["refused"] else [*lines, ("refused", "nothing")])


def _plain(value: Any) -> str:
    """A value of the description as people read it; of a list, the first and the last."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " to ".join(f"{one:,}" for one in (value[:1] + value[-1:] * (len(value) > 1)))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _aligned(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)
