"""Policies of somebody's own: registered, saved, loaded, and what is said where they are not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trol
from hosts import HOSTS
from trol.depth import policy as registry
from trol.errors import AdapterError, UsageError

OWN = """
from trol import AbstractPolicy, register
from trol.depth import Bounds

@register
class Thrice(AbstractPolicy):
    name = "thrice"
    def __init__(self, layer=0):
        super().__init__()
        self.layer = layer
    def bounds(self, layer):
        return Bounds(3, 3) if layer == self.layer else Bounds(1, 1)
    def again(self, visit):
        return 1.0
    def settings(self):
        return {"layer": self.layer}
"""

LOAD = """
import sys
sys.path[:0] = sys.argv[1:3]
import trol
from hosts import HOSTS
{first}
model = HOSTS["llama"].build(layers=2)
trol.load(model, sys.argv[3])
with trol.trace(model) as seen:
    model(**HOSTS["llama"].inputs())
print(seen.visits[:, 0, 0].tolist())
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module that registers a policy, and a model saved with it."""
    (tmp_path / "their_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    import their_own

    model = trol.attach(HOSTS["llama"].build(layers=2), their_own.Thrice(1))
    trol.save(model, tmp_path / "saved")
    yield tmp_path
    del sys.modules["their_own"]


def test_a_policy_of_ones_own_is_loaded_by_another_process(own: Path) -> None:
    code = LOAD.format(first="import their_own")
    tests = Path(__file__).parent.parent
    argv = [sys.executable, "-c", code, str(own), str(tests), str(own / "saved")]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[1, 3]", run.stderr


def test_a_policy_that_nobody_registered_says_how(own: Path) -> None:
    registry._REGISTERED.clear()
    with pytest.raises(AdapterError, match=r"cannot be loaded: unknown .*'thrice'.*trol\.register"):
        trol.load(HOSTS["llama"].build(layers=2), own / "saved")


def test_what_is_registered_is_a_policy_with_a_name_of_its_own(own: Path) -> None:
    assert trol.depth.policy.names().count("thrice") == 1
    import their_own

    assert trol.register(their_own.Thrice) is their_own.Thrice
    assert own.exists()

    class Other(their_own.Thrice):
        pass

    class Plan(their_own.Thrice):
        name = "plan"

    for wrong in (Other, Plan):
        with pytest.raises(UsageError, match="another policy is called"):
            trol.register(wrong)
    for nothing in (their_own.Thrice(), int, "thrice"):
        with pytest.raises(UsageError, match="register a subclass"):
            trol.register(nothing)
