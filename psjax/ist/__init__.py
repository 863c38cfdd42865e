r"""Independent subnet training: the subnets of each round, calibration, diagnostics.

B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent
Subnet Training*, arXiv:1910.02120. A round is `psjax.local_update` over `membership(...)`::

    net = psjax.models.MLP(num_classes=10, hidden=(512, 512))
    small = net.subnet(4)

    def loss_fn(params, batch):
        scores = small.apply({"params": params}, batch["x"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()

    update = psjax.local_update(loss_fn, optimizer)
    for round_number in range(rounds):
        selection = psjax.ist.membership(seed, round_number, axes, net.sizes, 4)
        params, opt_state, metrics = update(params, opt_state, selection, batches)  # [4, J, ...]
    statistics = psjax.ist.calibrate(net, params, sample)
    scores = net.apply({"params": params, "batch_stats": statistics}, x)
"""

from psjax import _public
from psjax._state import state_axes as state_axes
from psjax.ist._adam import ScaleByAdamState as ScaleByAdamState
from psjax.ist._adam import scale_by_adam as scale_by_adam
from psjax.ist._bias import GradientBias as GradientBias
from psjax.ist._bias import gradient_bias as gradient_bias
from psjax.ist._calibrate import calibrate as calibrate
from psjax.ist._checks import check_subnets as check_subnets
from psjax.ist._exchange import exchange as exchange
from psjax.ist._exchange import store_specs as store_specs
from psjax.ist._membership import membership as membership
from psjax.ist._membership import non_finite as non_finite

__dir__ = _public.listing(globals())
