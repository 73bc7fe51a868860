"""The list of hooks in `AbstractPolicy` says which policies use each, and that is so."""

import inspect
import re

import pytest

import trol
from trol.depth.policy import AbstractPolicy, policy_class

LISTED = dict(
    re.findall(r"- `(\w+)`[^:]*: ([\w,\s]+?)(?=\n- |$)", inspect.getdoc(AbstractPolicy) or "")
)
CLASSES = {name: policy_class(name) for name in trol.POLICIES}


def uses(policy: type[AbstractPolicy], hook: str) -> bool:
    default = inspect.getattr_static(AbstractPolicy, hook)
    overridden = inspect.getattr_static(policy, hook) is not default
    return overridden or f"self.{hook} =" in inspect.getsource(policy)


@pytest.mark.parametrize("hook", LISTED)
def test_the_policies_listed_use_the_hook_and_no_other(hook: str) -> None:
    listed = re.findall(r"\w+", LISTED[hook])
    if listed[:2] == ["all", "but"]:
        listed = sorted(CLASSES.keys() - set(listed[2:]))
    assert sorted(listed) == sorted(name for name, cls in CLASSES.items() if uses(cls, hook))


def test_every_hook_is_listed() -> None:
    own = {"bounds", "again", "settings", "name", "scope_in", "skips", "skipped_kv"}
    own |= {"applies_to_all", "keep_first"}
    public = {name for name in vars(AbstractPolicy) if not name.startswith("_")}
    assert public - own == {*LISTED, "enter"}
