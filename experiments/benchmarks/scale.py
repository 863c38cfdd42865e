"""What many classes and large layers cost: on the host before a training, and in a step.

Each figure is a ratio of two medians of programs that take turns, or seconds of a call on the host,
the least of three.

    taskset -c 0 python -m experiments.benchmarks.scale
    taskset -c 0 python -m experiments.benchmarks.scale --classes 200 --repeats 3
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import psjax
from experiments._lib.command import run_script
from experiments._lib.config import check_least
from experiments._lib.machine import machine
from experiments.benchmarks import timing
from experiments.benchmarks.timing import Ratio


@dataclasses.dataclass
class Args(timing.Args):
    """Time what grows with the number of classes, and with the width of a layer."""

    classes: int = 1000
    """Classes of the figures on the host; the goals are set for 1000."""
    hidden: int = 4096
    """Neurons of the hidden layer whose subnets are gathered and scattered."""

    def __post_init__(self):
        super().__post_init__()
        check_least("classes", self.classes, 8)
        check_least("hidden", self.hidden, 4)


# -------------------------------------------------------------------------------------- on the host


def seconds(call: Callable[[], Any]) -> float:
    """The least of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def on_host(C: int) -> Iterator[Ratio]:
    """Index sets, batches and plans of C classes: seconds."""
    params = {"trunk": jnp.zeros(4), "own": jnp.zeros((C, 2))}
    axes = {"trunk": P(), "own": P("class")}

    def select():
        pairs = psjax.ordered_pairs(C)
        return psjax.select(axes, {"class": pairs, "label": pairs[:, 0]}, like=params)

    labels = np.random.default_rng(0).integers(0, C, 60_000).astype(np.int32)
    net = psjax.models.PSNet(C, (4,), 1, (4,), (3, 2), (2, 1))
    best = lambda: psjax.plan.best(
        net,
        C,
        8,
        inputs=jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),
        batch_size=C,
        bandwidth=125e6,
        flops=1e11,
    )
    calls = {
        f"ordered_pairs and select, C = {C}": (0.6, select),
        f"batches_by_label, C = {C}, 60 000 samples": (
            0.1,
            lambda: psjax.data.batches_by_label(labels, C, C),
        ),
        f"plan.best, C = {C}, W = 8": (3.0, best),
    }
    for name, (goal, call) in calls.items():
        yield Ratio.between(f"{name}: seconds", goal, seconds(call), 1.0, "s")


def program_text(C: int) -> Iterator[Ratio]:
    """The program of C classes by elements against that of 20: it must not hold index sets."""

    def size(C):
        params = {"trunk": jnp.zeros(4), "own": jnp.zeros((C, 2))}
        pairs = psjax.ordered_pairs(C)
        indices = {"class": pairs, "label": pairs[:, 0]}
        axes = {"trunk": P(), "own": P("class")}
        selection = psjax.select(axes, indices, like=params)
        h = lambda w, x: jnp.sum(jnp.square(w["own"] @ x[0, :2])) + jnp.sum(w["trunk"] * x)
        fn = psjax.value_and_grad(h, in_axes=P("label"), chunk_size=C)
        batch = jax.ShapeDtypeStruct((C, 3, 4), jnp.float32)
        return len(jax.jit(fn).lower(params, selection, batch).as_text()) / 1024

    name = f"text of a program by elements, C = {C} / 20"
    yield Ratio.between(name, 1.1, size(C), size(20), "KiB")


# ---------------------------------------------------------------------------------------- in a step


def hundred_classes(repeats: int) -> Iterator[Ratio]:
    """9900 elements of a small PSNet, 200 balanced samples, against the fused loss."""
    C, L, shape = 100, 200, (8, 8, 1)
    net = psjax.models.PSNet(C, (20,), 4, (16,), (3, 2), (2, 1))
    params, axes = timing.init(net, jnp.zeros((1, *shape)))
    two, pairs = net.clone(num_classes=2), psjax.ordered_pairs(C)
    selection = psjax.select(axes, {"class": pairs, "label": pairs[:, 0]}, like=params)
    images = np.random.default_rng(0).random((C, L // C, *shape), np.float32)
    batch = {"image": jnp.asarray(images), "weight": jnp.full((C, L // C), 1.0 / L)}

    def h(w, batch):
        scores: Any = two.apply({"params": w}, batch["image"])
        return psjax.losses.pair(scores, batch["weight"])

    def fused(params, batch):
        x, y = batch["image"].reshape(L, *shape), jnp.repeat(jnp.arange(C), L // C)
        scores = lambda p: jnp.asarray(net.apply({"params": p}, x))
        loss = lambda p: jnp.mean(psjax.losses.psl_with_integer_labels(scores(p), y))
        return jax.value_and_grad(loss)(params)

    elements = jax.jit(psjax.value_and_grad(h, in_axes=P("label")))
    selection = jax.tree.map(jnp.asarray, selection)
    whole = jax.jit(fused)
    calls = {
        "fused": lambda: jax.block_until_ready(whole(params, batch)),
        "elements": lambda: jax.block_until_ready(elements(params, selection, batch)),
    }
    found = timing.take_turns(calls, repeats)
    name = "9900 elements of a small PSNet / fused"
    yield Ratio.of(name, 10.0, found["elements"], found["fused"])


def large_layers(hidden: int, repeats: int) -> Iterator[Ratio]:
    """Means of overlapping sets against one pass over the weights; a round against its steps."""
    w = {"weight": jnp.ones((hidden, hidden))}
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.permutation(hidden)[: hidden // 2]) for _ in range(4)]
    selection = psjax.select({"weight": P("hidden")}, {"hidden": rows}, like=w)
    selection = jax.tree.map(jnp.asarray, selection)
    stacked = jax.block_until_ready(jax.jit(selection.gather)(w))
    mean = jax.jit(lambda selection, stacked, w: selection.scatter_mean(stacked, w))
    once = jax.jit(lambda w: jax.tree.map(lambda x: 2 * x + 1, w))
    calls: dict[str, Callable[[], Any]] = {
        "mean": lambda: jax.block_until_ready(mean(selection, stacked, w)),
        "pass": lambda: jax.block_until_ready(once(w)),
    }
    found = timing.take_turns(calls, repeats)
    name = f"scatter_mean of 4 overlapping halves, [{hidden}, {hidden}] / one pass"
    yield Ratio.of(name, 2.0, found["mean"], found["pass"])
    yield from _round(hidden, repeats)


def _round(hidden, repeats):
    n, J, B = 4, 10, 128
    net = psjax.models.MLP(35, (hidden,), normalize=False)
    params, axes = timing.init(net, jnp.zeros((1, 1024)))
    small, optimizer = net.subnet(n), optax.adam(1e-3)
    x, y = jnp.ones((n, J, B, 1024)), jnp.zeros((n, J, B), jnp.int32)

    def loss_fn(w, batch):
        scores = jnp.asarray(small.apply({"params": w}, batch[0], train=True))
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()

    draw = lambda: psjax.ist.membership(0, 0, axes, net.sizes, n)
    selection = jax.jit(draw)()
    trees = (params, optimizer.init(params))
    specs = jax.tree.leaves(
        (axes, psjax.ist.state_axes(optimizer, axes, params)), is_leaf=lambda s: isinstance(s, P)
    )
    held = selection.of(specs, trees)

    def back_and_forth(trees, selection):
        """What a round does besides its steps: gather, scatter."""
        seen = jax.lax.optimization_barrier(selection.gather(trees))
        return selection.scatter_mean(seen, trees), ()

    def steps(state, batches):
        one = timing.steps_fn(jax.value_and_grad(loss_fn), optimizer)
        return jax.lax.map(lambda args: one(*args), (state, batches))

    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    stacked = jax.jit(held.gather)(trees)
    calls = {
        "exchange": timing.Program(jax.jit(back_and_forth, donate_argnums=0), copy(trees), (held,)),
        "steps": timing.Program(jax.jit(steps, donate_argnums=0), copy(stacked), ((x, y),)),
    }
    found = timing.take_turns(calls, repeats)
    name = f"gather and scatter / {J} local steps of Adam, hidden {hidden}, n = {n}, donated"
    yield Ratio.of(name, 0.15, found["exchange"], found["steps"])


def main(args: Args) -> None:
    print(machine())
    tables = (
        on_host(args.classes),
        program_text(args.classes),
        hundred_classes(args.repeats),
        large_layers(args.hidden, args.repeats),
    )
    timing.report(tables, args.path("scale.csv"))


if __name__ == "__main__":
    run_script(main, Args, __doc__, "nothing to continue, write the same command.")
