"""`trol info`: what is installed here, and what trol can do with it."""

from __future__ import annotations

from typing import Any

from trol.cli import terminal
from trol.cli.provenance import commit, machine, versions

EXAMPLES = (
    "trol info",
    "trol info --json",
    "trol info --json > info.json",
)


def info(as_json: terminal.AsJson = False) -> None:
    """Show versions, device, default model, policies and hosts."""
    with terminal.noise_to_stderr():
        result = _collect()
    terminal.report(result, as_json=as_json, text=lambda: _text(result))


def _collect() -> dict[str, Any]:
    import torch

    from trol.depth.registry import names
    from trol.host.layers import QUIRKS

    cuda = torch.cuda.is_available()
    return {
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "default_model": terminal.DEFAULT_MODEL,
        "policies": list(names()),
        "hosts": {
            "refused": {name: quirk.refused for name, quirk in QUIRKS.items() if quirk.refused},
            "no_holes": {name: quirk.no_holes for name, quirk in QUIRKS.items() if quirk.no_holes},
        },
    }


def _text(result: dict[str, Any]) -> str:
    lines: list[tuple[str, str]] = list(result["versions"].items())
    lines += [(name, str(result[name])) for name in ("commit", "machine", "device", "threads")]
    lines.append(("model", result["default_model"]))
    lines.append(("policies", ", ".join(result["policies"])))
    lines.append(("hosts", "any transformers decoder that is not refused below"))
    for kind, families in result["hosts"].items():
        lines += [(f"{kind.replace('_', ' ')}: {name}", why) for name, why in families.items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)
