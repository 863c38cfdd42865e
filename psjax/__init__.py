"""Training neural networks in independent pieces: gather, map, scatter."""

from psjax import _public
from psjax import axes as axes
from psjax import baselines as baselines
from psjax import codec as codec
from psjax import cost as cost
from psjax import data as data
from psjax import ist as ist
from psjax import losses as losses
from psjax import metrics as metrics
from psjax import models as models
from psjax import nn as nn
from psjax import plan as plan
from psjax import quasi_newton as quasi_newton
from psjax import structure as structure
from psjax._checks import check_elements as check_elements
from psjax._devices import pmap as pmap
from psjax._devices import shard as shard
from psjax._fragments import Fragments as Fragments
from psjax._fragments import fragments as fragments
from psjax._local import local_update as local_update
from psjax._masks import dropout_mask as dropout_mask
from psjax._outer import OuterState as OuterState
from psjax._outer import outer as outer
from psjax._pairs import ordered_pairs as ordered_pairs
from psjax._pairs import unordered_pairs as unordered_pairs
from psjax._partition import random_partition as random_partition
from psjax._select import replicas as replicas
from psjax._select import select as select
from psjax._selection import Selection as Selection
from psjax._separable import element_value_and_grad as element_value_and_grad
from psjax._separable import partially_separable as partially_separable
from psjax._separable import value_and_grad as value_and_grad
from psjax._update import LocalMetrics as LocalMetrics
from psjax.axes import check_axes as check_axes
from psjax.axes import infer_axes as infer_axes
from psjax.axes import narrow as narrow

__version__ = "0.1.0"
__dir__ = _public.listing(globals())
