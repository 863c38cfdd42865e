"""What a round of independent subnet training costs, as ratios from one run.

Dense layers with batch normalisation on inputs of 4096 features and 35 classes, batches of 128,
SGD, float32, J = 10 local steps a round. The programs of a table take turns; a figure is the ratio
of two medians, with the quartiles of the ratio round by round beside it.

    python -m experiments.benchmarks.ist
    python -m experiments.benchmarks.ist --repeats 3 --skip-torch

Where a figure compares work of unequal size, it compares milliseconds a GFLOP.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import psjax
from experiments._lib.command import run_script
from experiments._lib.machine import machine
from experiments.benchmarks import timing
from experiments.benchmarks.timing import Program, Ratio, product

CLASSES = 35
BATCH = 128
J = 10  # local steps of a round


@dataclasses.dataclass
class Args(timing.Args):
    """Time rounds of independent subnet training, and their parts, against one another."""

    skip_torch: bool = False
    """Leave out the comparison with PyTorch, which needs torch."""
    quick: bool = False
    """Layers 16 times as narrow: does it run? The goals mean nothing; no file unless --out."""


# ------------------------------------------------------------------------------------------- floor


def gflop(inputs: int, hidden: tuple[int, ...]) -> float:
    """Billions of floating-point operations a step, counted by hand: the products alone.

    Forward, for the weights and for the inputs: 2 operations each a weight and sample. The first
    layer's inputs need no gradient: 4 a weight there, 6 after.
    """
    sizes = (inputs, *hidden, CLASSES)
    first, *rest = (a * b for a, b in zip(sizes, sizes[1:]))
    return BATCH * (4 * first + 6 * sum(rest)) / 1e9


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


def one_row(x, e):
    """Row e, which may be traced, `[1, ...]`."""
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), e, 1)


def one_element(selection, e) -> psjax.Selection:
    """Element e, which may be traced, as a selection of one."""
    indices = jax.tree.map(lambda x: one_row(x, e), selection.indices)
    return dataclasses.replace(selection, indices=indices, valid=one_row(selection.valid, e))


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
        params, axes = timing.init(net, jnp.zeros((1, self.inputs)))
        return (params, self.optimizer.init(params)), axes

    def own_state(self):
        return jax.tree.map(jnp.copy, self.state)

    def membership(self, n: int) -> psjax.Selection:
        make = lambda: psjax.ist.membership(0, 0, self.axes, self.net.sizes, n)
        return jax.jit(make)()

    def make_steps(self, net):
        """`(state, batches) -> state, losses`: the steps of a worker, without a round around."""
        steps = timing.steps_fn(jax.value_and_grad(make_loss(net)), self.optimizer)
        return jax.jit(steps, donate_argnums=0)

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
            batches = jax.tree.map(lambda x: one_row(x, e), batches)
            return self.make_round(n)(state, one_element(selection, e), batches)

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
            params = jax.tree.map(lambda x: x[0], one_element(selection, e).gather(state[0]))
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
    seconds = timing.take_turns(calls, repeats)
    per_gflop = seconds["steps"] / J / gflop(inputs, (width // 2,))
    reference = seconds["product"] / (2e-9 * side**3)
    layers = f"{inputs}-{width // 2}-{CLASSES}"
    figure = f"local step {layers} / product of {side} x {side}"
    yield in_gflop(figure, 1 / 0.60, per_gflop, reference)
    if with_torch:
        times = seconds["steps"] / J, seconds["torch"] / J
        yield Ratio.of(f"local step {layers} / PyTorch eager", 0.5, *times)


def whole_round(scale: int, repeats: int):
    """A round of n subnets as one program, one hidden layer of 4096."""
    bench = Bench(4096 // scale, (4096 // scale,))
    for n in (2, 4):
        calls: dict[str, Callable[[], None]] = {
            "round": bench.round(n),
            "rounds of one": bench.rounds_of_one(n),
            "one by one": bench.one_by_one(n),
        }
        seconds = timing.take_turns(calls, repeats)
        for figure, goal, name in (
            (f"{n} rounds of one subnet", 1.1, "rounds of one"),
            (f"{n} trained one by one, merged once", None, "one by one"),
        ):
            figure = f"round of {n} subnets / {figure}"
            yield Ratio.of(figure, goal, seconds["round"], seconds[name])


def gather_and_scatter(scale: int, repeats: int):
    """What a round does besides local steps, two hidden layers of 8192, n = 4.

    From the same program with 1 and with 11 local steps: their difference is 10 local steps, and
    what the first takes beyond a tenth of it is the round around them, everything in it included
    (gather, the elements' loop, the test for NaN, scatter, mean).
    """
    bench = Bench(4096 // scale, (8192 // scale,) * 2)
    calls = {"short": bench.round(4, 1), "long": bench.round(4, 1 + J)}
    seconds = timing.take_turns(calls, repeats)
    local_steps = seconds["long"] - seconds["short"]
    around = seconds["short"] - local_steps / J
    figure = f"gather and scatter / {J} local steps, 2 x {8192 // scale}, n = 4"
    yield Ratio.of(figure, 0.2, around, local_steps)


def narrower_steps(scale: int, repeats: int):
    """A subnet's step against the whole network's, both by GFLOP, two hidden layers of 8192."""
    inputs, width = 4096 // scale, 8192 // scale
    bench = Bench(inputs, (width,) * 2)
    number = {1: 2, 2: 6, 4: 12, 8: 30}
    seconds = timing.take_turns({str(n): bench.steps(n, k) for n, k in number.items()}, repeats)
    work = {n: k * gflop(inputs, (width // n,) * 2) for n, k in number.items()}
    per_gflop = {n: seconds[str(n)] / work[n] for n in number}
    for n in (2, 4, 8):
        figure = f"local step, 2 x {width} / {n} / dense step 2 x {width}"
        yield in_gflop(figure, 1.25, per_gflop[n], per_gflop[1])


def in_gflop(figure: str, goal: float, seconds: np.ndarray, reference: np.ndarray):
    """A ratio of seconds a GFLOP."""
    row = Ratio.of(figure, goal, seconds, reference)
    return dataclasses.replace(row, unit="ms/GFLOP")


def compilations(rounds: int = 100) -> Iterator[Ratio]:
    """Programs compiled for rounds that have subnets of their own each."""
    bench = Bench(16, (32, 32))
    a_round = bench.make_round(4)

    @jax.jit
    def fn(state, batches, round):
        selection = psjax.ist.membership(0, round, bench.axes, bench.net.sizes, 4)
        return a_round(state, selection, batches)

    batches = some_batches(4, 2, inputs=16)
    calls = (lambda r=r: fn(bench.state, batches, r) for r in range(rounds))
    yield Ratio.between(
        f"compilations, {rounds} rounds / 1", 1, timing.count_compilations(calls), 1, ""
    )


def main(args: Args) -> None:
    with_torch = timing.find_torch(args.skip_torch)
    print(machine(*(("torch",) if with_torch else ())))
    print(f"batches of {BATCH}, SGD, J = {J}, float32; {args.repeats} rounds\n")
    scale = 16 if args.quick else 1
    tables = (
        local_step(scale, args.repeats, with_torch),
        whole_round(scale, args.repeats),
        gather_and_scatter(scale, args.repeats),
        narrower_steps(scale, args.repeats),
        compilations(),
    )
    timing.report(tables, args.out if args.quick else args.path("ist.csv"))


if __name__ == "__main__":
    run_script(main, Args, __doc__, "nothing to continue, write the same command.")
