"""What a training step with a partially-separable loss costs, as ratios from one run.

PSNet `mnist` (46740 weights), Adam, float32. Each program is a jitted `lax.scan` over training
steps that take their uint8 images from the device and scale them. The programs take turns; a figure
is the ratio of two medians, with the quartiles of the ratio round by round beside it.

    python -m experiments.benchmarks.psl
    python -m experiments.benchmarks.psl --batch-sizes 100 --repeats 3 --skip-torch

Balanced batches have equally many samples of each class, so that sorting by label costs nothing. If
MNIST is there, the same for its own batches: by label, with as many slots as the epoch's fullest
batch needs, and also in tiles of 4.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import psjax
from experiments._lib.command import run_script
from experiments._lib.machine import machine
from experiments.benchmarks import in_torch, timing
from experiments.psl import training

C = 10  # classes
TILE = 4
BLOCK = 4
BALANCED = "balanced"
NAMES = {
    "fused": "fused",
    "elements": "90 elements",
    "tiles": "90 elements in tiles of 4",
    "pairs": "45 merged pairs",
    "blocks": "10 cyclic blocks of 4 classes",
}
# At most this many times the fused step, on balanced batches of 100; of 20; on MNIST's own of 100.
GOALS = {"elements": 2.0, "pairs": 2.0, "blocks": 1.7}
GOALS_OF_20 = {"elements": 3.0}
GOALS_OF_MNIST = {"elements": 4.0}
IMAGES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


@dataclasses.dataclass
class Args(timing.Args):
    """Time training steps of a PSNet against one another."""

    batch_sizes: tuple[int, ...] = (100, 20)
    """Samples a step; multiples of 10. The goals are set for 100."""
    loss: str = "psl-squared"
    """Partially-separable loss: psl-squared (the authors' runs) or psl."""
    skip_torch: bool = False
    """Leave out the comparison with PyTorch, which needs torch."""
    data: str | None = None
    """Where TFDS keeps MNIST; default: TFDS_DATA_DIR, else TFDS's own."""

    def __post_init__(self):
        super().__post_init__()
        for size in self.batch_sizes:
            if size < C or size % C:
                msg = f"--batch-sizes {size}: write multiples of {C}, for balanced batches."
                raise ValueError(msg)


# ------------------------------------------------------------------------------------------- floor


def flops(compute: str) -> int:
    """Floating-point operations a sample and step, counted by hand on the network as computed.

    A 5x5 convolution and 2x2 pooling are one 6x6 convolution of stride 2. Two operations a product:

        trunk, once an evaluation     12*12 outputs, 6*6*1 inputs,  40 kernels
        fan-out, once a class          4*4  outputs, 6*6*40 inputs,  3 kernels
        separable layers, a class     48*24 + 24*15 + 15*1

    The backward pass repeats the products once for the weights and once for the inputs; the trunk's
    inputs are the images and need none. The trunk is evaluated once for each label. How many
    classes' groups a sample meets: an element (k, j) evaluates 2 groups on the samples of k, so 18;
    a cyclic block of s classes all its groups on the samples of all its classes, so s*s.
    """
    trunk = 2 * 144 * 36 * 40
    group = 2 * (16 * 36 * 40 * 3 + 48 * 24 + 24 * 15 + 15)
    pairs = 2 * (C - 1)
    groups = {"fused": C, "elements": pairs, "tiles": pairs, "pairs": pairs, "blocks": BLOCK**2}
    return 2 * trunk + 3 * groups[compute] * group


def matmul_rate(repeats: int = 9, n: int = 2048) -> float:
    """Float32 operations a second of this machine, in a product of two 2048 x 2048 matrices."""
    seconds = timing.take_turns({"": timing.product(n)}, repeats)[""]
    return 2 * n**3 / float(np.median(seconds))


# ------------------------------------------------------------------------------------------ batches


def balanced(batch_size: int, preset: str = "mnist") -> psjax.data.Dataset:
    """Noise for images, and labels such that every batch has each class equally often."""
    n = 100 * batch_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *IMAGES[preset]), np.uint8)
    labels = rng.permuted(np.tile(np.arange(C, dtype=np.int32), (n // C, 1)), axis=1).ravel()
    return psjax.data.Dataset(BALANCED, images, labels, C, 1 / 255)


def index_batches(compute: str, dataset: psjax.data.Dataset, batch_size: int) -> psjax.data.Batches:
    """An epoch in the set's own order, in the form that a way of computing needs."""
    if compute == "fused":
        return psjax.data.batches(dataset.labels, batch_size)
    if compute == "tiles":
        return psjax.data.tiles_by_label(dataset.labels, C, batch_size, TILE)
    return psjax.data.batches_by_label(dataset.labels, C, batch_size)


def some_steps(batches: psjax.data.Batches, steps: int, tiles: bool) -> dict[str, jax.Array]:
    """The epoch's batches again and again, `[steps, ...]`; never its last, which may be short."""
    rows = np.arange(steps) % (len(batches.indices) - 1)
    parts = {"indices": batches.indices[rows], "weights": batches.weights[rows]}
    if tiles:
        parts["labels"] = batches.labels[rows]
    return {name: jnp.asarray(x) for name, x in parts.items()}


def steps_a_call(compute: str, batches: psjax.data.Batches) -> int:
    """So many that a call takes half a second, at 100 GFLOP/s and 0.1 ms an element."""
    elements = {"fused": 1, "elements": 90, "pairs": 45, "blocks": C}
    of_tiles = (C - 1) * int(batches.indices.shape[1])
    number = int(elements.get(compute, of_tiles))
    seconds = flops(compute) * np.prod(batches.indices.shape[1:]) / 1e11 + 1e-4 * number
    return max(2, round(0.5 / seconds))


# ----------------------------------------------------------------------------------------- programs


def init(net, preset="mnist"):
    """Parameters and their axes."""
    return timing.init(net, jnp.zeros((1, *IMAGES[preset])))


def make_steps(loss_and_grad, optimizer):
    """`(state, batches, data, selection) -> state, losses`: a scan over steps, state donated."""

    def steps(state, batches, data, selection):
        def one(params, batch):
            index = batch["indices"]
            images = psjax.data.take(data["images"], index, data["scale"])
            own = {"image": images, "weight": batch["weights"]}
            if selection is None:
                own["label"] = psjax.data.take(data["labels"], index)
            here = selection
            if "labels" in batch:
                here = training.tile_selection(selection, batch["labels"], C)
            return loss_and_grad(params, here, own)

        return timing.steps_fn(one, optimizer)(state, batches)

    return jax.jit(steps, donate_argnums=0)


@dataclasses.dataclass
class Program(timing.Program):
    """Some training steps as one call that keeps its state."""

    steps: int


class Bench:
    """The network, and programs that train it from the same weights."""

    def __init__(self, loss: str, preset: str = "mnist", model: str = "psnet"):
        self.loss, self.preset, self.model = loss, preset, model
        self.net = training.make_model(preset, C, model)
        self.params, self.axes = init(self.net, preset)
        self.margin_fn = psjax.losses.margin_function(loss)
        self.optimizer = optax.adam(1e-3)

    def loss_and_grad(self, compute: str, loss: str):
        tile = TILE if compute == "tiles" else None
        config = training.Config(
            dataset=self.preset,
            model=self.model,
            loss=loss,
            compute="elements" if compute == "tiles" else compute,
            block_size=BLOCK,
            tile=tile,
        )
        return training.loss_and_grad_fn(config, self.net, self.axes, self.params, C)

    def program(self, compute, dataset, data, batch_size, loss=None, loss_and_grad=None) -> Program:
        fn, selection = self.loss_and_grad(compute, loss or self.loss)
        batches = index_batches(compute, dataset, batch_size)
        steps = steps_a_call(compute, batches)
        rows = some_steps(batches, steps, compute == "tiles")
        params = jax.tree.map(jnp.copy, self.params)
        state = (params, self.optimizer.init(params))
        if selection is not None:
            selection = jax.tree.map(jnp.asarray, selection)
        jitted = make_steps(loss_and_grad or fn, self.optimizer)
        return Program(jitted, state, (rows, data, selection), steps)

    def in_torch(self, dataset, batch_size: int, steps: int):
        """The fused step in eager PyTorch, as a call of so many."""
        batches = np.asarray(index_batches("fused", dataset, batch_size).indices)
        return in_torch.program(self.model, dataset, batches, steps, self.loss)

    def element(self, net=None):
        """Element (k, j): two scores, the samples labelled k."""
        two = (net or self.net).clone(num_classes=2)

        def h(params, batch):
            scores = two.apply({"params": params}, batch["image"])
            return psjax.losses.pair(scores, batch["weight"], self.margin_fn)

        return h

    def one_program(self):
        """All 90 elements at once, as a program for an accelerator evaluates them."""
        return psjax.value_and_grad(self.element(), in_axes=P("label"), chunk_size=90)

    def scalar_form(self):
        """Value and gradient of `psjax.partially_separable`, by `jax.value_and_grad`."""
        return jax.value_and_grad(psjax.partially_separable(self.element(), in_axes=P("label")))

    def whole_passes(self, dataset, batch_size: int, implementation: str | None):
        """One gradient, of 90 whole reverse passes, one after the other, without Adam.

        Each h_kj by a jitted `jax.grad` through the whole network, on the samples labelled k. One
        compiled program takes k and j as arguments: 90 programs take minutes to compile.
        """
        net = self.net.clone(implementation=implementation)
        scale = jnp.float32(dataset.scale)
        batches = index_batches("elements", dataset, batch_size)
        slots = np.minimum(batches.indices[0], len(dataset.images) - 1)  # an empty one weighs 0
        images = [jnp.asarray(dataset.images[rows]) for rows in slots]
        weights = [jnp.asarray(w) for w in batches.weights[0]]

        @jax.jit
        @jax.grad
        def grad(params, raw, weight, pair):
            scores = net.apply({"params": params}, raw.astype(jnp.float32) * scale)
            return psjax.losses.pair(scores[:, pair], weight, self.margin_fn)

        pairs = [(k, jnp.array([k, j])) for k, j in psjax.ordered_pairs(C)]

        def call():
            grads = [grad(self.params, images[k], weights[k], pair) for k, pair in pairs]
            jax.block_until_ready(grads)

        return call


# ------------------------------------------------------------------------------------------- tables


@dataclasses.dataclass
class Table:
    """Programs that take turns, their steps a call, and the rows made of their seconds a step."""

    calls: dict[str, Callable[[], None]]
    steps: dict[str, int]
    rows: Callable[[dict[str, np.ndarray]], list[timing.Ratio]]

    def measure(self, repeats: int) -> list[timing.Ratio]:
        seconds = timing.take_turns(self.calls, repeats)
        return self.rows({name: s / self.steps[name] for name, s in seconds.items()})


def table_of(bench: Bench, dataset, data, batch_size: int, with_torch: bool) -> Table:
    """All ratios of a batch size; the goals are for balanced batches, most for those of 100."""
    real = dataset.name != BALANCED
    make = lambda compute, **kwargs: bench.program(compute, dataset, data, batch_size, **kwargs)
    # Every class has the same samples in balanced batches: tiles would save nothing.
    split = [name for name in NAMES if name != "fused" and (real or name != "tiles")]
    programs: dict[str, Program] = {name: make(name) for name in ("fused", *split)}
    programs["nll"] = make("fused", loss="nll")
    programs["one"] = make("elements", loss_and_grad=bench.one_program())
    programs["scalar"] = make("elements", loss_and_grad=bench.scalar_form())
    calls: dict[str, Callable[[], None]] = dict(programs)
    steps = {name: program.steps for name, program in programs.items()}
    for name, implementation in (("passes", None), ("native passes", "native")):
        calls[name], steps[name] = bench.whole_passes(dataset, batch_size, implementation), 1
    if with_torch:
        steps["torch"] = steps["fused"] // 2
        calls["torch"] = bench.in_torch(dataset, batch_size, steps["torch"])

    def split_name(name):
        if not real:
            return f"{NAMES[name]} ({flops(name) / flops('fused'):.1f}x products)"
        return (
            f"{NAMES[name]} ({index_batches(name, dataset, batch_size).padding_factor:.2f} slots)"
        )

    def rows(seconds):
        def row(figure, goal, name, reference, sizes=(100,)):
            figure = f"{'MNIST: ' if real else ''}{figure}, batch {batch_size}"
            goal = None if batch_size not in sizes else goal
            return timing.Ratio.of(figure, goal, seconds[name], seconds[reference])

        if real:
            goals = GOALS_OF_MNIST if batch_size == 100 else {}
        else:
            goals = {100: GOALS, 20: GOALS_OF_20}.get(batch_size, {})
        once = None if real else 1.05
        out = [row("fused PSL / fused NLL", once, "fused", "nll")]
        if with_torch:
            eager = None if real else 0.40
            out.append(row("fused PSL / PyTorch eager", eager, "fused", "torch", (100, 20)))
        for name in split:
            what = f"{split_name(name)} / fused"
            out.append(row(what, goals.get(name), name, "fused", (100, 20)))
        once = None if real else 2.5
        out.append(row("90 elements at once, chunk_size 90 / fused", once, "one", "fused"))
        whole = "90 elements / 90 whole reverse passes"
        out.append(row(whole, None if real else 0.10, "elements", "passes"))
        out.append(row(whole + ", lax conv", None, "elements", "native passes"))
        form = "scalar form / explicit form"
        out.append(row(form, None if real else 1.1, "scalar", "elements"))
        return out

    return Table(calls, steps, rows)


def one_ratio(figure: str, goal: float, calls, steps) -> Table:
    """A table of one row: the first of two programs against the second."""
    one, other = calls
    return Table(calls, steps, lambda s: [timing.Ratio.of(figure, goal, s[one], s[other])])


def cifar_table(bench: Bench, dataset) -> Table:
    """Elements of the CIFAR10 PSNet against its fused loss, balanced batches of 100."""
    data = training.on_device(dataset)
    programs = {name: bench.program(name, dataset, data, 100) for name in ("elements", "fused")}
    steps = {name: program.steps for name, program in programs.items()}
    return one_ratio("CIFAR10: 90 elements / fused, batch 100", 1.3, programs, steps)


def lenet_table(bench: Bench, dataset, batch_size: int) -> Table:
    """The fused step of the MNIST LeNet, 44426 weights, against PyTorch's."""
    fused = bench.program("fused", dataset, training.on_device(dataset), batch_size)
    steps = {"fused": fused.steps, "torch": fused.steps // 2}
    calls = {"fused": fused, "torch": bench.in_torch(dataset, batch_size, steps["torch"])}
    figure = f"LeNet: fused PSL / PyTorch eager, batch {batch_size}"
    return one_ratio(figure, 0.35, calls, steps)


def memory(bench: Bench):
    """Rows of the table: what XLA allocates for one gradient by elements, 10 samples of each class.

    Temporary memory, besides arguments and results. Were it to grow with the number of elements,
    20 classes would take 380/90 = 4.2 times what 10 take.
    """

    def kib(num_classes, chunk_size):
        net = bench.net.clone(num_classes=num_classes)
        params, axes = init(net)
        pairs = psjax.ordered_pairs(num_classes)
        selection = psjax.select(axes, {"class": pairs, "label": pairs[:, 0]}, like=params)
        fn = psjax.value_and_grad(bench.element(), in_axes=P("label"), chunk_size=chunk_size)
        batch = {
            "image": jax.ShapeDtypeStruct((num_classes, 10, 28, 28, 1), jnp.float32),
            "weight": jax.ShapeDtypeStruct((num_classes, 10), jnp.float32),
        }
        compiled = jax.jit(fn).lower(params, selection, batch).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes / 1024

    one = kib(C, 1)
    for k, goal in ((9, 9), (90, 13)):
        yield timing.Ratio.between(f"memory, chunk_size {k} / 1", goal, kib(C, k), one, "KiB")
    yield timing.Ratio.between("memory, 20 / 10 classes, chunk_size 1", 2, kib(20, 1), one, "KiB")


def count_compilations(bench: Bench) -> int:
    """Compilations of a gradient by elements that is called with three different index sets."""
    fn, _ = bench.loss_and_grad("elements", bench.loss)
    step = jax.jit(fn)
    pairs = psjax.ordered_pairs(C)
    orders = (pairs, pairs[:, ::-1], np.random.default_rng(0).permutation(pairs))
    select = lambda p: psjax.select(
        bench.axes, {"class": p, "label": p[:, 0]}, like=bench.params, specialize=False
    )
    selections = [select(p) for p in orders]
    batch = {"image": jnp.zeros((C, 2, 28, 28, 1)), "weight": jnp.full((C, 2), 0.05)}
    return timing.count_compilations(
        lambda one=one: step(bench.params, one, batch) for one in selections
    )


def main(args: Args) -> None:
    with_torch = timing.find_torch(args.skip_torch)
    bench = Bench(args.loss)
    print(machine(*(("torch",) if with_torch else ())))
    print(f"PSNet mnist, 46740 weights, Adam, float32; loss {args.loss}; {args.repeats} rounds")
    print(f"compilations over 3 index sets (goal: 1): {count_compilations(bench)}")

    tables = []
    for size in args.batch_sizes:
        dataset = balanced(size)
        tables.append(table_of(bench, dataset, training.on_device(dataset), size, with_torch))
    cifar = Bench(args.loss, "cifar10")
    tables.append(cifar_table(cifar, balanced(100, "cifar10")))
    if with_torch:
        lenet = Bench(args.loss, model="lenet")
        tables += [lenet_table(lenet, balanced(size), size) for size in args.batch_sizes]
    try:
        mnist = psjax.data.load("mnist", "train", args.data)
    except (FileNotFoundError, ImportError) as error:
        print(f"Without MNIST's own batches: {error}")
    else:
        data = training.on_device(mnist)
        tables += [table_of(bench, mnist, data, size, with_torch) for size in args.batch_sizes]
    bytes_used = list(memory(bench))
    for table in tables:
        timing.take_turns(table.calls, 1)
    print("Compiled and warm.", flush=True)
    rate = matmul_rate()
    print(f"float32 matmul rate (2048^3): {rate / 1e9:.0f} GFLOP/s")
    for batch_size in args.batch_sizes:
        floors = {name: 1e3 * flops(name) * batch_size / rate for name in ("fused", *GOALS)}
        listed = ", ".join(f"{name} {ms:.2f}" for name, ms in floors.items())
        print(f"floor, batch {batch_size}, products / rate, ms: {listed}")
    print()
    measured = (table.measure(args.repeats) for table in tables)
    timing.report(itertools.chain(measured, [bytes_used]), args.path("psl.csv"))


if __name__ == "__main__":
    run_script(main, Args, __doc__, "nothing to continue, write the same command.")
