r"""What goes over the wire between workers: packed bits in the place of floats.

A codec turns an array into packed arrays and back. It is for *differences*: the gradients of a
step, or what local steps changed. `compress` puts one between the workers of a round, and `mean`
between those of a gradient step::

    update = psjax.local_update(loss_fn, optax.adamw(3e-4))
    update = psjax.codec.compress(update, psjax.codec.int4(64), "workers")
    update = psjax.outer(update, optax.sgd(0.7, momentum=0.9, nesterov=True))

`int8`, `int4` and `int2` round stochastically: the expectation of what is decoded is what was
encoded. `top_k` and coarse codecs need `error_feedback`.
"""

from psjax import _public
from psjax.codec._codecs import Codec as Codec
from psjax.codec._codecs import cast as cast
from psjax.codec._codecs import error_feedback as error_feedback
from psjax.codec._codecs import identity as identity
from psjax.codec._codecs import int2 as int2
from psjax.codec._codecs import int4 as int4
from psjax.codec._codecs import int8 as int8
from psjax.codec._codecs import top_k as top_k
from psjax.codec._compress import CompressState as CompressState
from psjax.codec._compress import compress as compress
from psjax.codec._reduce import mean as mean

__dir__ = _public.listing(globals())
