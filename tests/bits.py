"""`jax.jit` for tests of equal bits."""

import functools
import os

import jax

# As users have it; where conftest.py turns it off, two programs of one computation may round
# differently.
_OFF = "--xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
_OPTIONS = {"xla_cpu_use_fusion_emitters": True} if _OFF else None
jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
