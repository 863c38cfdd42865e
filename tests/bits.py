"""`jax.jit` for tests of equal bits."""

import functools
import importlib.metadata

import jax

# As users have it; conftest.py turns it off for the other tests, and then two programs of one
# computation may round differently.
_OPTIONS = {"xla_cpu_use_fusion_emitters": True}
_HAS_THEM = importlib.metadata.version("jaxlib").startswith("0.10.")
jit = functools.partial(jax.jit, compiler_options=_OPTIONS if _HAS_THEM else None)
