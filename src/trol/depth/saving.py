"""Saving a model that needs trol, so that nothing opens it without trol by accident.

The folder is the host's own, parameters of the policy among its weights; but `config.json` names
the model type `trol_host`, which transformers does not know, and holds the host's configuration
and the policy's settings. `trol.load_model(folder)` opens it, and once trol is imported,
`AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

import json
from pathlib import Path

from trol.depth.policy import AbstractPolicy
from trol.depth.registry import to_settings

MODEL_TYPE = "trol_host"
"""The model type of a saved host that carries a policy."""


def mark(folder: str | Path, policy: AbstractPolicy) -> None:
    """Makes the saved configuration in `folder` say that this model needs trol and this policy."""
    path = Path(folder) / "config.json"
    host = json.loads(path.read_text(encoding="utf-8"))
    marked = {"model_type": MODEL_TYPE, "depth": to_settings(policy), "host": host}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
