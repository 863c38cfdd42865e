r"""Which worker evaluates which elements of a partially-separable loss, on which samples.

Section 5.4 of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned
neural network training*, G-2023-36. The loss is a sum of elements $h_{kj}$, one per ordered pair of
classes. A `Plan` gives every pair to one worker. This worker needs the weights of both classes and
the samples with label $k$. If it holds $s$ classes, it evaluates the shared layers once for all
pairs among them. If it has several tasks, it takes them in turns, in the memory of one task.

Four functions make plans:

- `elements`: a task is one pair $(k, j)$.
- `pairs`: a task is $(k, j)$ and $(j, k)$ together, the only merging that costs no memory.
- `blocks`: a task is all pairs among a few classes.
- `cyclic`: the classes are in groups, and worker $w$ holds the groups $w + D$, where the
  differences of $D$ cover all. If W divides C, every worker does the same work.

If there are more workers than tasks, several workers do the same task on disjoint samples.

`Plan.by_label` divides every task by its labels. On whole parameters, the tasks of a worker then
share the evaluation of the shared layers for a label.

`value_and_grad` runs a plan with the weights in shards (`Store`). `table` lists the costs of each
plan beside data parallelism, score exchange and independent subnets; `best` chooses a plan.
"""

from psjax import _public
from psjax.plan._best import best as best
from psjax.plan._cost import Prediction as Prediction
from psjax.plan._cost import Table as Table
from psjax.plan._cost import Workload as Workload
from psjax.plan._cost import table as table
from psjax.plan._cost import workload as workload
from psjax.plan._covers import difference_cover as difference_cover
from psjax.plan._plan import Plan as Plan
from psjax.plan._plan import blocks as blocks
from psjax.plan._plan import cyclic as cyclic
from psjax.plan._plan import elements as elements
from psjax.plan._plan import pairs as pairs
from psjax.plan._step import value_and_grad as value_and_grad
from psjax.plan._store import Store as Store

__dir__ = _public.listing(globals())
