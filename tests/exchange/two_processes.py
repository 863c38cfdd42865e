"""Rounds with a codec between two real processes: `python -m ... ADDRESS PROCESS`.

Process 0 prints the bytes of a round that went over the loopback interface, those that the ledger
of the compiled program says, and how far the weights are from those of two workers simulated on one
device.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from psjax import codec, cost

SIZE, ROUNDS, J = 1_000_000, 10, 1


def loss_fn(w, target):
    """Its gradient differs from entry to entry."""
    return 0.5 * jnp.sum((w - target * jnp.linspace(-1.0, 1.0, w.size)) ** 2)


def sent():
    """Bytes that all processes have sent over the loopback interface."""
    with open("/proc/net/dev") as lines:
        line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def main(address, process):
    """Train as one of two processes."""
    jax.distributed.initialize(address, 2, process)
    mesh = jax.make_mesh((2,), ("w",), axis_types=(AxisType.Auto,))
    local = psjax.local_update(loss_fn, optax.sgd(0.1))
    update = codec.compress(local, codec.int4(64), "w")
    w, targets = jnp.zeros(SIZE), np.arange(1.0, 3.0, dtype=np.float32).reshape(2, 1, J)
    state, alone = update.init(w), psjax.replicas(w, 1)

    @jax.jit
    def train(w, state, targets):
        body = lambda w, state, target: update(w, state, alone, target[0])[:2]
        specs = dict(in_specs=(P(), P(), P("w")), out_specs=(P(), P()))
        return jax.shard_map(body, mesh=mesh, **specs, check_vma=False)(w, state, targets)

    everywhere = lambda x: multihost_utils.host_local_array_to_global_array(x, mesh, P())
    own = NamedSharding(mesh, P("w"))
    batches = jax.make_array_from_process_local_data(own, targets[process : process + 1])
    mine = jax.tree.map(everywhere, (w, state))
    compiled = train.lower(*mine, batches).compile()
    mine = jax.block_until_ready(compiled(*mine, batches))
    multihost_utils.sync_global_devices("before")
    before = sent()
    for _ in range(ROUNDS):
        mine = jax.block_until_ready(compiled(*mine, batches))
    after = sent()
    multihost_utils.sync_global_devices("after")
    if process:
        return
    body = lambda w, state, target: update(w, state, alone, target)[:2]
    simulated = jax.jit(jax.vmap(body, (None, None, 0), (None, None), axis_name="w"))
    theirs = w, state
    for _ in range(1 + ROUNDS):
        theirs = simulated(*theirs, jnp.asarray(targets))
    far = np.abs(np.asarray(mine[0].addressable_data(0)) - theirs[0]).max()
    print((after - before) / ROUNDS, cost.ledger(compiled).bytes, far)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
