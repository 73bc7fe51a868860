"""Modules that moved are found by their old names, with a warning that gives the new one."""

from importlib import import_module

import pytest

from trol import _MOVED


@pytest.mark.parametrize(("old", "new"), _MOVED.items())
def test_an_old_name_gives_the_module_that_has_a_new_one(old: str, new: str) -> None:
    target = import_module(f"trol.{new}")
    with pytest.warns(DeprecationWarning, match=f"trol.{new}"):
        module = import_module(f"trol.{old}")
    public = {name: value for name, value in vars(target).items() if not name.startswith("__")}
    assert all(getattr(module, name) is value for name, value in public.items())


def test_an_old_name_with_nothing_behind_it_fails() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("trol.policies.never_was")
