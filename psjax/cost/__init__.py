"""Traffic and work by formulas; traffic, work and memory by a ledger of compiled programs.

The formulas are for plain networks of `t` dense layers, `widths = (N_0, ..., N_t)`, whose layer `i`
has a matrix of $N_{i-1} N_i$ weights. Each function returns the `Cost` of one gradient step, for
all n workers together:

- `data_parallel`, `local_sgd` and `independent_subnets` count what a cluster without a coordinator
  sends and computes.
- `printed_data_parallel` and `printed_independent_subnets` are section 4.2 and figure 2 of
  B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent
  Subnet Training*, [arXiv:1910.02120](https://arxiv.org/abs/1910.02120), as printed.

`ledger` counts the same traffic and work in any program that XLA has compiled, and the memory that
the program needs on a device.
"""

from psjax import _public
from psjax.cost._formulas import Cost as Cost
from psjax.cost._formulas import data_parallel as data_parallel
from psjax.cost._formulas import encoded_mean as encoded_mean
from psjax.cost._formulas import independent_subnets as independent_subnets
from psjax.cost._formulas import local_sgd as local_sgd
from psjax.cost._formulas import printed_data_parallel as printed_data_parallel
from psjax.cost._formulas import printed_independent_subnets as printed_independent_subnets
from psjax.cost._ledger import Collective as Collective
from psjax.cost._ledger import Ledger as Ledger
from psjax.cost._ledger import Memory as Memory
from psjax.cost._ledger import ledger as ledger

__dir__ = _public.listing(globals())
