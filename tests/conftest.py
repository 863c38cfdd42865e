"""Eight virtual CPU devices, before JAX looks at them; data where it is."""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Both workers and every process that a test starts share what one of them has compiled.
    programs = tempfile.mkdtemp(prefix="psjax-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # XLA warns of the tuning flags `prefer-no-gather` and `-scatter` once per program.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
if importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.12 has no such flag
    # Halves XLA's time for what these tests compile: 5.3 s to 2.8 in eight tests of test_state.py.
    flags = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import jaxtyping
import pytest

# Types are checked at every call, where beartype is installed; an int is a float.
if importlib.util.find_spec("beartype") is not None:
    jaxtyping.install_import_hook(
        "psjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )

jax.config.update("jax_num_cpu_devices", 8)
# What is compiled here runs once or twice: LLVM's optimizations take longer than they save.
jax.config.update("jax_disable_most_optimizations", True)

_here = pathlib.Path(__file__).resolve().parent.parent
_shared = _here.parent / "shared" / "tensorflow_datasets"
if "TFDS_DATA_DIR" not in os.environ and _shared.is_dir():
    os.environ["TFDS_DATA_DIR"] = str(_shared)


def pytest_collection_modifyitems(items):
    """Marks what `tests/slow.txt` names: files, and tests of others."""
    slow = set((_here / "tests" / "slow.txt").read_text().split())
    for item in items:
        name = item.nodeid.partition("[")[0]
        if not slow.isdisjoint((name, name.partition("::")[0])):
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """Frees what a module has compiled.

    JAX keeps the programs of 8192 jitted functions; with more, `_cache_size()` of a new one is 0.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """No silent promotion of dtypes or ranks: for tests of the core, which does neither."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def any_type():
    """No check of types: for tests of psjax's own errors on wrong ones, and that count calls."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
