"""How many elements to evaluate at once, from what one of them computes and holds."""

import math
import os
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from psjax._programs import programs_in

# Operations of a step of a loop on a CPU. With fewer, starting the step takes longer than the work.
# The products of runs share an operand and grow with the number of elements; others do not, and
# many small products together are slower than one after the other.
_FLOPS, _FLOPS_OF_RUNS = 2**21, 2**27


def chunk_sizes(program: ClosedJaxpr, num_elements: int, run_length: int) -> tuple[int, int]:
    """Elements evaluated at once on a CPU, and elsewhere, where the user has not said.

    On a CPU, as many runs as it takes to make a step of the loop worth starting: products of large
    elements are no faster together. Elsewhere all. In both cases no more than fit into a part of
    the memory, by the sizes of the intermediate arrays of one element.

    Args:
      program: `jax.make_jaxpr` of the element function, of what one element sees.
      num_elements: E.
      run_length: elements that share what they see of some axes.
    """
    flops, temporaries = work(program.jaxpr)
    fits = lambda memory: max(1, min(num_elements, int(memory // max(1, 2 * temporaries))))
    most = _FLOPS_OF_RUNS if run_length > 1 else _FLOPS
    runs = max(1, most // max(1, flops * run_length))
    return min(fits(_host_memory() / 8), run_length * runs), fits(_device_memory() / 4)


def work(jaxpr: Jaxpr) -> tuple[int, int]:
    """Operations of the products of a program, and bytes of all arrays that it makes."""
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
    """Of the default device, 16 GiB where it does not say or is a CPU."""
    stats = None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()
    return (stats or {}).get("bytes_limit", 2**34)
