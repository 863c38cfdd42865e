r"""Which weights a score depends on, how many, and which elements share weights.

Section 5 of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned
neural network training*, G-2023-36: a score depends on the common weights and on those of its
class. An element, which is a pair of classes, depends on the common weights and on those of both
classes.

**Dropout** (section 6.1 and figure 5) changes this structure. Weights are dropped by
`Selection.drop`, or by the argument `keep` of the functions here. Without the layers that all
scores share, two scores share no weight, $U_j U_{j_2}^\top = 0$, and two elements share only the
weights of a class that both have; `overlap` counts them. Elements that share no weight can be
evaluated together, in a *round*. Take the pairs of classes as edges of the complete graph: a round
is a set of edges that do not touch, and `rounds` finds C - 1 rounds for even C, and C for odd C.

>>> import jax, jax.numpy as jnp, psjax
>>> from jax.sharding import PartitionSpec as P
>>> params = {"trunk": jnp.ones(3), "own": jnp.arange(4.0)}
>>> axes = {"trunk": P(), "own": P("class")}
>>> pairs = {"class": psjax.unordered_pairs(4)}
>>> keep = psjax.dropout_mask(jax.random.key(0), params, layers={"trunk": 1.0})
>>> selection = psjax.select(axes, pairs, like=params).drop(keep)
>>> together = psjax.structure.in_rounds(selection, params)
>>> together.valid.shape  # [rounds, elements]: each round is a partition of the classes
(3, 2)
>>> element_fn = lambda w: jnp.sum(w["trunk"]) + jnp.prod(w["own"])
>>> loss_and_grad = psjax.value_and_grad(element_fn, chunk_size=4)
>>> def body(total, selection):
...     return jax.tree.map(jnp.add, total, loss_and_grad(params, selection)), None
>>> zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
>>> (loss, grads), _ = jax.lax.scan(body, zeros, together)
>>> grads["own"]  # of each class, the sum of the others
Array([6., 5., 4., 3.], dtype=float32)

The sum is the whole gradient, in any order. The gradient of a round is put back without a scatter.
"""

from psjax import _public
from psjax.structure._count import WeightCounts as WeightCounts
from psjax.structure._count import count as count
from psjax.structure._count import dependence as dependence
from psjax.structure._dependencies import Dependencies as Dependencies
from psjax.structure._dependencies import dependencies as dependencies
from psjax.structure._draw import draw as draw
from psjax.structure._overlap import num_weights as num_weights
from psjax.structure._overlap import overlap as overlap
from psjax.structure._rounds import disjoint_rounds as disjoint_rounds
from psjax.structure._rounds import in_rounds as in_rounds
from psjax.structure._rounds import rounds as rounds

__dir__ = _public.listing(globals())
