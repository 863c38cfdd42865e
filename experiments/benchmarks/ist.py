"""What a round of independent subnet training costs, as ratios from one run.

Dense layers with batch normalisation on inputs of 4096 features and 35 classes, batches of 128,
SGD, float32, J = 10 local steps a round. The programs of a table take turns; a figure is the ratio
of two medians, with the quartiles of the ratio round by round beside it.

    python -m experiments.benchmarks.ist
    python -m experiments.benchmarks.ist --repeats 3 --skip-torch

Where a figure compares work of unequal size, it compares milliseconds a GFLOP.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import psjax
from experiments.benchmarks import _timing
from experiments.benchmarks._timing import Program

CLASSES = 35
BATCH = 128
J = 10  # local steps of a round


@dataclasses.dataclass
class Args:
    """Time rounds of independent subnet training, and their parts, against one another."""

    repeats: int = 9
    """Rounds; the figures are medians over them."""
    out: pathlib.Path | None = None
    """Where the table goes, as CSV; default: results/ist.csv beside this file."""
    skip_torch: bool = False
    """Leave out the comparison with PyTorch, which needs torch."""
    quick: bool = False
    """Layers 16 times as narrow: does it run? The goals mean nothing; no file unless --out."""

    def __post_init__(self):
        if self.repeats < 1:
            msg = f"--repeats {self.repeats}: write 1 or more."
            raise ValueError(msg)
        if self.out is None and not self.quick:
            self.out = pathlib.Path(__file__).parent / "results" / "ist.csv"


# ------------------------------------------------------------------------------------------- floor


def gflop(inputs: int, hidden: tuple[int, ...]) -> float:
    """Billions of floating-point operations a step, counted by hand: the products alone.

    Forward, for the weights and for the inputs: 2 operations each a weight and sample. The first
    layer's inputs need no gradient: 4 a weight there, 6 after.
    """
    sizes = (inputs, *hidden, CLASSES)
    first, *rest = (a * b for a, b in zip(sizes, sizes[1:]))
    return BATCH * (4 * first + 6 * sum(rest)) / 1e9


def product(n: int) -> Callable[[], None]:
    """A product of two n x n matrices: what this machine can do at the same moment."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32))
    fn = jax.jit(jnp.matmul)

    def call():
        jax.block_until_ready(fn(a, a))

    return call


# ---------------------------------------------------------------------------------------- programs


def some_batches(*lead: int, inputs: int) -> dict[str, jax.Array]:
    """Noise and labels, `[*lead, batch, ...]`."""
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.standard_normal((*lead, BATCH, inputs), np.float32)),
        "y": jnp.asarray(rng.integers(0, CLASSES, (*lead, BATCH), np.int32)),
    }


def make_loss(net):
    def loss_fn(params, batch):
        scores = net.apply({"params": params}, batch["x"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()

    return loss_fn


class Bench:
    """A network that is trained in subnets, and programs that do parts of it.

    Every program has weights of its own, which it donates, as a training would: the result of a
    round is written where its weights were.
    """

    def __init__(self, inputs: int, hidden: tuple[int, ...]):
        self.inputs = inputs
        self.net = psjax.models.MLP(num_classes=CLASSES, hidden=hidden)
        self.optimizer = optax.sgd(0.01)
        self.state, self.axes = self.init(self.net)

    def init(self, net):
        """Parameters with the optimizer's state, and the parameters' axes."""
        variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, self.inputs)))
        params = nn.unbox(variables)["params"]
        return (params, self.optimizer.init(params)), nn.get_partition_spec(variables)["params"]

    def own_state(self):
        return jax.tree.map(jnp.copy, self.state)

    def membership(self, n: int) -> psjax.Selection:
        make = lambda: psjax.ist.membership(0, 0, self.axes, self.net.sizes, n)
        return jax.jit(make)()

    def make_steps(self, net):
        """`(state, batches) -> state, losses`: the steps of a worker, without a round around."""
        loss_fn = make_loss(net)

        def step(state, batch):
            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)

    def steps(self, n: int, number: int) -> Program:
        """Local steps of one of n subnets; n = 1: of the whole network."""
        net = self.net.subnet(n)
        batches = some_batches(number, inputs=self.inputs)
        return Program(self.make_steps(net), self.init(net)[0], (batches,))

    def make_round(self, n: int):
        update = psjax.local_update(make_loss(self.net.subnet(n)), self.optimizer)

        def a_round(state, selection, batches):
            params, opt_state, metrics = update(*state, selection, batches)
            return (params, opt_state), metrics

        return a_round

    def round(self, n: int, local_steps: int = J) -> Program:
        """A round: n subnets in one program."""
        batches = some_batches(n, local_steps, inputs=self.inputs)
        fn = jax.jit(self.make_round(n), donate_argnums=0)
        return Program(fn, self.own_state(), (self.membership(n), batches))

    def rounds_of_one(self, n: int) -> Program:
        """The same in n calls, each a round of one subnet: gather, train, scatter."""

        def of_one(state, selection, batches, e):
            own = lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), e, 1)
            indices = jax.tree.map(own, selection.indices)
            one = dataclasses.replace(selection, indices=indices, valid=own(selection.valid))
            return self.make_round(n)(state, one, jax.tree.map(own, batches))

        call_one = jax.jit(of_one, donate_argnums=0)

        def fn(state, *args):
            for e in range(n):
                state, _ = call_one(state, *args, e)
            return state, None

        batches = some_batches(n, J, inputs=self.inputs)
        return Program(fn, self.own_state(), (self.membership(n), batches))

    def one_by_one(self, n: int) -> Program:
        """The same in n calls that gather, n that train, and one that scatters all.

        The least that rounds one after the other can cost: what they learn is merged once.
        """
        train = self.make_steps(self.net.subnet(n))

        @jax.jit
        def gather(state, selection, e):
            own = lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), e, 1)
            indices = jax.tree.map(own, selection.indices)
            one = dataclasses.replace(selection, indices=indices, valid=own(selection.valid))
            params = jax.tree.map(lambda x: x[0], one.gather(state[0]))
            return params, self.optimizer.init(params)

        def scatter(state, selection, trained):
            params = [params for params, _ in trained]
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *params)
            return selection.scatter_mean(stacked, state[0]), trained[0][1]

        scatter = jax.jit(scatter, donate_argnums=0)

        def fn(state, selection, batches):
            trained = [train(gather(state, selection, e), batches[e])[0] for e in range(n)]
            return scatter(state, selection, trained), None

        stacked = some_batches(n, J, inputs=self.inputs)
        batches = [jax.tree.map(lambda x, e=e: x[e], stacked) for e in range(n)]
        return Program(fn, self.own_state(), (self.membership(n), batches))


def torch_steps(inputs: int, width: int, number: int) -> Callable[[], None]:
    """The same steps in eager PyTorch: same layers, loss and optimizer, its own threads."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loss_fn = nn.CrossEntropyLoss()
    batches = some_batches(number, inputs=inputs)
    xs = torch.from_numpy(np.array(batches["x"]))
    ys = torch.from_numpy(np.array(batches["y"], np.int64))

    def call():
        for x, y in zip(xs, ys):
            optimizer.zero_grad()
            loss_fn(net(x), y).backward()
            optimizer.step()

    return call


# ------------------------------------------------------------------------------------------ tables


def local_step(scale: int, repeats: int, with_torch: bool):
    """A worker's step, one hidden layer of 4096, n = 2; the goal is 60 % of the matmul rate."""
    inputs, width, side = 4096 // scale, 4096 // scale, 2048 // scale
    bench = Bench(inputs, (width,))
    calls: dict[str, Callable[[], None]] = {"steps": bench.steps(2, J), "product": product(side)}
    if with_torch:
        calls["torch"] = torch_steps(inputs, width // 2, J)
    seconds = _timing.take_turns(calls, repeats)
    per_gflop = seconds["steps"] / J / gflop(inputs, (width // 2,))
    reference = seconds["product"] / (2e-9 * side**3)
    layers = f"{inputs}-{width // 2}-{CLASSES}"
    figure = f"local step {layers} / product of {side} x {side}"
    yield in_gflop(figure, 1 / 0.60, per_gflop, reference)
    if with_torch:
        times = seconds["steps"] / J, seconds["torch"] / J
        yield _timing.Ratio.of(f"local step {layers} / PyTorch eager", 0.5, *times)


def whole_round(scale: int, repeats: int):
    """A round of n subnets as one program, one hidden layer of 4096."""
    bench = Bench(4096 // scale, (4096 // scale,))
    for n in (2, 4):
        calls: dict[str, Callable[[], None]] = {
            "round": bench.round(n),
            "rounds of one": bench.rounds_of_one(n),
            "one by one": bench.one_by_one(n),
        }
        seconds = _timing.take_turns(calls, repeats)
        for figure, goal, name in (
            (f"{n} rounds of one subnet", 1.1, "rounds of one"),
            (f"{n} trained one by one, merged once", None, "one by one"),
        ):
            figure = f"round of {n} subnets / {figure}"
            yield _timing.Ratio.of(figure, goal, seconds["round"], seconds[name])


def gather_and_scatter(scale: int, repeats: int):
    """What a round does besides local steps, two hidden layers of 8192, n = 4.

    From the same program with 1 and with 11 local steps: their difference is 10 local steps, and
    what the first takes beyond a tenth of it is the round around them, everything in it included
    (gather, the elements' loop, the test for NaN, scatter, mean).
    """
    bench = Bench(4096 // scale, (8192 // scale,) * 2)
    calls = {"short": bench.round(4, 1), "long": bench.round(4, 1 + J)}
    seconds = _timing.take_turns(calls, repeats)
    local_steps = seconds["long"] - seconds["short"]
    around = seconds["short"] - local_steps / J
    figure = f"gather and scatter / {J} local steps, 2 x {8192 // scale}, n = 4"
    yield _timing.Ratio.of(figure, 0.2, around, local_steps)


def narrower_steps(scale: int, repeats: int):
    """A subnet's step against the whole network's, both by GFLOP, two hidden layers of 8192."""
    inputs, width = 4096 // scale, 8192 // scale
    bench = Bench(inputs, (width,) * 2)
    number = {1: 2, 2: 6, 4: 12, 8: 30}
    seconds = _timing.take_turns({str(n): bench.steps(n, k) for n, k in number.items()}, repeats)
    work = {n: k * gflop(inputs, (width // n,) * 2) for n, k in number.items()}
    per_gflop = {n: seconds[str(n)] / work[n] for n in number}
    for n in (2, 4, 8):
        figure = f"local step, 2 x {width} / {n} / dense step 2 x {width}"
        yield in_gflop(figure, 1.25, per_gflop[n], per_gflop[1])


def in_gflop(figure: str, goal: float, seconds: np.ndarray, reference: np.ndarray):
    """A ratio of seconds a GFLOP."""
    row = _timing.Ratio.of(figure, goal, seconds, reference)
    return dataclasses.replace(row, unit="ms/GFLOP")


def count_compilations(rounds: int = 100) -> int:
    """Compilations over rounds of one program, each with subnets of its own."""
    bench = Bench(16, (32, 32))
    a_round = bench.make_round(4)

    @jax.jit
    def fn(state, batches, round):
        selection = psjax.ist.membership(0, round, bench.axes, bench.net.sizes, 4)
        return a_round(state, selection, batches)

    state, batches = bench.state, some_batches(4, 2, inputs=16)
    seen = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for r in range(rounds):
        state, _ = fn(state, batches, r)
    jax.block_until_ready(state)
    return len(seen)


def main(args: Args) -> None:
    with_torch = not args.skip_torch
    if with_torch and importlib.util.find_spec("torch") is None:
        print("torch is not installed: no comparison with PyTorch.")
        with_torch = False
    packages = ("jax", "jaxlib", *(("torch",) if with_torch else ()))
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{versions}; {usable} of {os.cpu_count()} CPUs; {jax.default_backend()}")
    print(f"batches of {BATCH}, SGD, J = {J}, float32; {args.repeats} rounds\n")
    scale = 16 if args.quick else 1
    print(_timing.HEADER)
    rows: list[_timing.Ratio] = []
    tables = (
        local_step(scale, args.repeats, with_torch),
        whole_round(scale, args.repeats),
        gather_and_scatter(scale, args.repeats),
        narrower_steps(scale, args.repeats),
        [_timing.Ratio.between("compilations, 100 rounds / 1", 1, count_compilations(), 1, "")],
    )
    for table in tables:
        for row in table:
            print(row, flush=True)
            rows.append(row)
            if args.out is not None:
                _timing.write(args.out, rows)
    if args.out is not None:
        print(f"\nWritten to {args.out}.")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__))
