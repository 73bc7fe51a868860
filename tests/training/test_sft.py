"""TRL's SFTTrainer takes an attached model, as examples/finetuning/with_trl.py shows."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetuning" / "with_trl.py"


@pytest.mark.filterwarnings("ignore")  # TRL's own, on import
def test_the_example_learns_with_gates_alone_and_with_everything(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl")
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    output = capsys.readouterr().out
    assert "8 tensors moved,\n    all of them gates: True" in output  # weight and bias of 4 layers
    assert "answer: 6 <end>" in output
    assert "visits of the question: [2, 2, 2, 2]" in output
