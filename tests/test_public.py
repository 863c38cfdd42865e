"""Completion shows psjax's names: `dir` of a public module lists what is public, and no more."""

import importlib
import types

import pytest

import psjax

PACKAGES = ["psjax"] + [
    f"psjax.{name}" for name in dir(psjax) if isinstance(getattr(psjax, name), types.ModuleType)
]
DUNDERS = {"__doc__", "__file__", "__version__"}
each_module = pytest.mark.parametrize("name", PACKAGES)


def test_the_public_modules_are_these():
    names = "axes baselines codec cost data ist losses metrics models nn plan quasi_newton"
    names = [*names.split(), "structure"]
    assert ["psjax", *(f"psjax.{name}" for name in names)] == PACKAGES


@each_module
def test_dir_lists_no_private_and_no_foreign_name(name):
    module = importlib.import_module(name)
    listed = set(dir(module)) - DUNDERS
    assert listed
    assert not [other for other in listed if other.startswith("_")]
    for other in listed:
        value = getattr(module, other)
        if isinstance(value, types.ModuleType):
            assert value.__name__ == f"psjax.{other}"
        elif isinstance(value, type | types.FunctionType):
            assert value.__module__.startswith("psjax")


@each_module
def test_dir_leaves_out_nothing_that_a_star_import_takes(name):
    module = importlib.import_module(name)
    taken = {}
    exec(f"from {name} import *", taken)
    modules = {key for key, value in taken.items() if isinstance(value, types.ModuleType)}
    foreign = modules - set(dir(module))
    assert set(taken) - {"__builtins__"} - foreign <= set(dir(module))
