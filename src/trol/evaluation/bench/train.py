"""What a training step with a second visit for all tokens takes, to twice the step without."""

from __future__ import annotations

from trol.data.chat import IGNORED
from trol.depth import attach
from trol.evaluation.bench.hosts import host, twin
from trol.evaluation.bench.limits import scaled
from trol.evaluation.bench.row import Row, row
from trol.evaluation.bench.setting import Setting
from trol.evaluation.timing import interleaved, time_step
from trol.policies.mixer import TrolMixer

MUST = 1.025


def train(setting: Setting, rounds: int) -> list[Row]:
    """One loss and its gradients."""
    bare = host(setting, training=True).train()
    traversing = attach(twin(bare), TrolMixer())
    whole = setting.size.prompt
    rows = []
    for batch, tokens in ((1, whole), (4, whole // 2)):
        ids = setting.ids(batch, tokens)
        labels = ids.clone()
        labels[:, : tokens // 2] = IGNORED
        inputs = {"input_ids": ids, "labels": labels}
        times = interleaved(
            {
                "bare": lambda inputs=inputs: time_step(bare, inputs),
                "traversing": lambda inputs=inputs: time_step(traversing, inputs),
            },
            rounds=rounds,
        )
        case = f"all tokens b{batch} t{tokens}"
        limits, must = scaled(times["bare"], 2), setting.must(MUST)
        limit = "2 x the bare step"
        rows.append(row(case, times["bare"], times["traversing"], limits, limit=limit, must=must))
    return rows
