r"""Partially-separable losses: functions of the margins between pairs of scores.

Let $c_j$ be the score of class $j$, $y$ the label and $\varphi$ a *margin function*. The loss of a
sample is $\sum_{j \ne y} \varphi(c_j - c_y)$; over a batch of $L$ samples, with weight $1/L$,

$$\mathcal L = \sum_k \sum_{j \ne k} h_{kj}, \qquad
  h_{kj} = \frac1L \sum_l \delta(y_l = k)\, \varphi(c_j(x_l) - c_k(x_l)),$$

With $\varphi = \exp$ these are (6b) and (6c) of P. Raynaud, D. Orban, J. Bigeon,
*Partially-separable loss to parallelize partitioned neural network training*, G-2023-36.

There are three functions for this loss. `psl_with_integer_labels` takes all scores. `pair` is
$h_{kj}$ and takes two scores. `block` takes any $s$ scores and sums chosen pairs among them. Summed
over the elements, the last two equal the first, up to rounding.

For very many labels, `many_label_cross_entropy` and `top_k_labels` work in chunks of labels.
"""

from psjax import _public
from psjax.losses._many_labels import many_label_cross_entropy as many_label_cross_entropy
from psjax.losses._many_labels import top_k_labels as top_k_labels
from psjax.losses._margins import MarginFn as MarginFn
from psjax.losses._margins import block as block
from psjax.losses._margins import bounded_exponential as bounded_exponential
from psjax.losses._margins import exponential as exponential
from psjax.losses._margins import margin_function as margin_function
from psjax.losses._margins import nll_with_integer_labels as nll_with_integer_labels
from psjax.losses._margins import one_score as one_score
from psjax.losses._margins import one_vs_all_with_integer_labels as one_vs_all_with_integer_labels
from psjax.losses._margins import pair as pair
from psjax.losses._margins import psl_with_integer_labels as psl_with_integer_labels
from psjax.losses._margins import softplus as softplus
from psjax.losses._margins import squared_exponential as squared_exponential
from psjax.losses._margins import squared_hinge as squared_hinge

__dir__ = _public.listing(globals())
