"""How many elements to evaluate at once, from the work and the memory of one."""

import math
import os
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from psjax._programs import programs_in

# Least operations in one step of a loop on a CPU: with fewer, starting the step takes longer than
# its work. The second number is for runs: their products share an operand and merge into larger
# ones. Without runs, many small products at once are slower than one after the other.
_FLOPS, _FLOPS_OF_RUNS = 2**21, 2**27


def chunk_sizes(program: ClosedJaxpr, num_elements: int, run_length: int) -> tuple[int, int]:
    """Default numbers of elements evaluated at once: on a CPU, and elsewhere.

    On a CPU, just as many runs as make a step of the loop worth its start: large elements are no
    faster together. Elsewhere, all elements. In both cases no more than fit into a part of the
    memory, estimated by the intermediate arrays of one element.

    Args:
      program: the element function as a jaxpr, on what one element sees.
      num_elements: E.
      run_length: number of consecutive elements that share rows.
    """
    flops, temporaries = work(program.jaxpr)
    fits = lambda memory: max(1, min(num_elements, int(memory // max(1, 2 * temporaries))))
    most = _FLOPS_OF_RUNS if run_length > 1 else _FLOPS
    runs = max(1, most // max(1, flops * run_length))
    return min(fits(_host_memory() / 8), run_length * runs), fits(_device_memory() / 4)


def work(jaxpr: Jaxpr) -> tuple[int, int]:
    """Operations of all products in a program, and bytes of all arrays that it makes."""
    flops = temporaries = 0
    for eqn in jaxpr.eqns:
        inner = [work(j) for j in programs_in(eqn)]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "cond":
            inner = [tuple(max(x) for x in zip(*inner))]
        for f, t in inner:
            flops, temporaries = flops + times * f, temporaries + t
        if not inner:
            temporaries += sum(_bytes(v.aval) for v in eqn.outvars)
        flops += _product(eqn)
    return flops, temporaries


def _product(eqn: JaxprEqn):
    out = math.prod(_shape(eqn.outvars[0])) if eqn.outvars else 0
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(_shape(eqn.invars[0])[d] for d in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = _shape(eqn.invars[1])
        features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * out * math.prod(kernel) // features
    return out


def _shape(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def _bytes(aval: Any):
    return math.prod(getattr(aval, "shape", ())) * getattr(
        getattr(aval, "dtype", None), "itemsize", 4
    )


def _host_memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_memory():
    """Memory of the default device in bytes; 16 GiB if it is a CPU or does not say."""
    stats = None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()
    return (stats or {}).get("bytes_limit", 2**34)
