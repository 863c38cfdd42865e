"""Layers with one group of outputs per class, so that one gather takes a sub-network.

Every kernel of a grouped layer has the group axis first, `[groups, ..., features]`, annotated
with `flax.linen.with_logical_partitioning`. Therefore `flax.linen.get_partition_spec` returns the
`axes` that `psjax.select` takes. A sub-network of `m` groups is the same module with `groups=m`.

The layers are those of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize
partitioned neural network training*, G-2023-36, section 5.2; `features` counts the outputs of
**one** group, where the paper counts all groups together.
"""

from psjax import _public
from psjax.nn._conv import conv as conv
from psjax.nn._conv import sigmoid as sigmoid
from psjax.nn._groups import Conv as Conv
from psjax.nn._groups import Dense as Dense
from psjax.nn._groups import FanOutConv as FanOutConv
from psjax.nn._groups import FanOutDense as FanOutDense
from psjax.nn._groups import SeparableConv as SeparableConv
from psjax.nn._groups import SeparableDense as SeparableDense
from psjax.nn._groups import flatten_groups as flatten_groups
from psjax.nn._groups import split_groups as split_groups
from psjax.nn._subnet import SubnetDense as SubnetDense
from psjax.nn._subnet import SubnetNorm as SubnetNorm

__dir__ = _public.listing(globals())
