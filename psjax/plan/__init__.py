r"""Which worker evaluates which elements of a partially-separable loss, on which samples.

Section 5.4 of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned
neural network training*, G-2023-36. The loss is a sum of elements $h_{kj}$, one an ordered pair of
classes. A `Plan` gives every pair to one worker, which must hold both its classes' weights and see
the samples labelled $k$. A worker that holds $s$ classes evaluates the shared layers once for all
pairs among them; one that has several tasks takes them in turn, in the memory of one.

- `elements`: a task is one pair $(k, j)$; `pairs`: $(k, j)$ and $(j, k)$ together, the only merging
  that costs no memory; `blocks`: all pairs among a few classes.
- `cyclic`: the classes in groups, worker $w$ holds the groups $w + D$, where the differences of $D$
  cover all; where W divides C every worker does the same work.

Where there are more workers than tasks, some do the same task on disjoint samples.

`Plan.by_label` divides every task by its labels: on whole parameters, where nothing is fetched, the
tasks of a worker then share a label's trunk.

`value_and_grad` runs a plan with the weights in shards (`Store`); `table` says what each plan
costs, beside data parallelism, score exchange and independent subnets; `best` chooses.
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
