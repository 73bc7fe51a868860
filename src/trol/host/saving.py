"""Saving a model that needs trol, so that nothing opens it without trol by accident.

The folder is the host's own, parameters of the policy among its weights; but `config.json` names
the model type `trol_host`, which transformers does not know, and holds the host's configuration
and the policy's settings. `trol.load_model(folder)` opens it, and after `import trol.family`,
`AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL_TYPE = "trol_host"
"""The model type of a saved host that carries a policy."""


def mark(folder: str | Path, policy: dict[str, Any]) -> None:
    """Makes a saved configuration say that its model needs trol, and a policy of these settings."""
    path = Path(folder) / "config.json"
    host = json.loads(path.read_text(encoding="utf-8"))
    marked = {"model_type": MODEL_TYPE, "depth": policy, "host": host}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
