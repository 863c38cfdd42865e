"""The machine that a figure was measured on, in words."""

import importlib.metadata
import os
import pathlib
import platform

import jax


def machine(*packages: str) -> str:
    """Versions of jax, jaxlib and these, the processor, and how much of it may be used."""
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", *packages)
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = f"{usable} of {os.cpu_count()} CPUs ({processor()}); {jax.default_backend()}"
    return f"{versions}; {where}"


def processor() -> str:
    """As Linux names it, or as Python does."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
