"""Independent subnet training and what it is compared with: many rounds as one compiled program.

A researcher's own script needs the ten lines of `round_fn`; the rest is data, seeds and devices.

Samples come as one stream for each seed, the concatenation of the epochs' permutations. A local
step of all n workers takes the next n B of them, a round of J steps the next n J B; a round may lie
across the end of an epoch, so that no step is lost and none is short. What is reported of epoch e
is the state after the first round by which e N samples have been seen. Where a round is longer than
an epoch, the epochs that end in it are reported as the last of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from experiments._lib import program
from experiments._lib.program import initial_states as initial_states
from experiments.ist.config import DATASETS as DATASETS
from experiments.ist.config import SPEECH as SPEECH
from experiments.ist.config import Config as Config

# ------------------------------------------------------------------------------------------- pieces


def resolve(config: Config, data_dir: str | None = None) -> Config:
    """The configuration with a data set: spoken_digit where it is prepared, else digits."""
    if config.dataset is not None:
        return config
    try:
        psjax.data.load_speech("spoken_digit", "test", data_dir)
    except (FileNotFoundError, ImportError):
        return dataclasses.replace(config, dataset="digits")
    return dataclasses.replace(config, dataset="spoken_digit")


def load(dataset: str, split: str, data_dir: str | None = None) -> tuple[dict[str, Any], int]:
    """A split, and its number of classes.

    `x` are features in dB, `[N, 4096]`, or images in uint8, which `inputs` brings into [0, 1]:
    times `scale` plus `shift`.
    """
    if dataset in SPEECH:
        name = dataset.removesuffix("_words")
        speech = psjax.data.load_speech(name, split, data_dir, **SPEECH[dataset])
        scale = 1 / psjax.data.LogMel().dynamic_range
        x, labels, classes, shift = speech.features, speech.labels, speech.num_classes, 1
    else:
        images = psjax.data.load(dataset, split, data_dir)
        x, labels, classes = images.images, images.labels, images.num_classes
        scale, shift = images.scale, 0
    labels = psjax.data.check_labels(labels, classes)
    return {"x": x, "y": labels, "scale": np.float32(scale), "shift": np.float32(shift)}, classes


def inputs(data, index):
    """The inputs of some samples, in [0, 1]; `[*index.shape, ...]`."""
    return psjax.data.take(data["x"], index, data["scale"]) + data["shift"]


def make_model(config: Config, num_classes: int):
    normalize = config.normalization != "none"
    make = {"mlp": psjax.models.MLP, "vgg11": psjax.models.VGG11}[config.model]
    return make(
        num_classes=num_classes,
        hidden=config.hidden,
        normalize=normalize,
        normalize_output=normalize and config.normalize_output,
        use_scale=config.scale_shift,
        use_bias=config.scale_shift,
        dropout=1 - 1 / config.subnets if config.method == "data-parallel-dropout" else 0.0,
    )


def make_optimizer(config: Config, num_samples: int | None = None) -> optax.GradientTransformation:
    """The optimizer of a configuration; `num_samples` are those of an epoch.

    Raises:
      ValueError: the learning rate decays after some epochs, of unknown length.
    """
    rate = config.learning_rate
    if config.decay_after is not None:
        if num_samples is None:
            msg = f"decay_after={config.decay_after}: epochs of unknown length; pass num_samples."
            raise ValueError(msg)
        # A local step of all workers sees n B samples, and every state counts its own steps.
        steps = -(-config.decay_after * num_samples // (config.subnets * config.batch_size))
        rate = optax.piecewise_constant_schedule(config.learning_rate, {steps: 0.1})
    return program.make_optimizer(config.optimizer, rate, config.clip)


def num_devices(config: Config) -> int:
    return 1 if config.devices == "one" else min(config.subnets, jax.device_count())


# ------------------------------------------------------------------------------------------- stream


class Stream:
    """The samples of every seed, in rounds.

    Args:
      num_samples: of an epoch.
      shape: local steps, workers, samples of one worker's step: a round.
      epochs: those of the training.
      seeds: their numbers.
    """

    def __init__(self, num_samples: int, shape: tuple[int, int, int], epochs: int, seeds: range):
        self.num_samples, self.shape, self.epochs, self.seeds = num_samples, shape, epochs, seeds
        self.samples_a_round = int(np.prod(shape))
        self.most_rounds = self.rounds(1)  # between two reports
        # A round may lie in two epochs, and whoever asks for single rounds asks often.
        self._order = functools.lru_cache(maxsize=2 * len(seeds))(self.order)

    def rounds(self, epoch: int) -> int:
        """Rounds by which so many epochs have been seen."""
        return -(-epoch * self.num_samples // self.samples_a_round)

    def reports(self, after: int = 0) -> list[int]:
        """The epochs to report, later than `after`; of those that end in one round the last."""
        by_round = {self.rounds(e): e for e in range(1, self.epochs + 1)}
        return [e for r, e in by_round.items() if r > self.rounds(after)]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """An epoch's samples in order, from (seed, epoch) alone."""
        return np.random.default_rng([seed, epoch]).permutation(self.num_samples)

    def _one(self, seed, first, last):
        start, stop = first * self.samples_a_round, last * self.samples_a_round
        epochs = range(start // self.num_samples, -(-stop // self.num_samples))
        drawn = np.concatenate([self._order(seed, epoch) for epoch in epochs])
        skip = start - epochs[0] * self.num_samples
        own = drawn[skip : skip + stop - start].reshape(-1, *self.shape)
        room = np.zeros((self.most_rounds, *self.shape), np.int32)
        room[: last - first] = own
        return np.swapaxes(room, 1, 2)

    def __call__(self, first: int, last: int) -> np.ndarray:
        """Indices of the rounds `first` to `last - 1`: int32 `[seeds, most_rounds, n, J, B]`."""
        return np.stack([self._one(seed, first, last) for seed in self.seeds])


def make_stream(config: Config, num_samples: int) -> Stream:
    """The stream of a configuration."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    shape = config.local_steps, config.subnets, config.batch_size
    return Stream(num_samples, shape, config.epochs, seeds)


def calibration_sample(num_samples: int, batches: int) -> np.ndarray:
    """Training samples that statistics are computed from, int32 `[batches, 128]`, or fewer."""
    size = min(128, num_samples)
    batches = min(batches, num_samples // size)
    drawn = np.random.default_rng(0).permutation(num_samples)[: batches * size]
    return drawn.reshape(batches, size).astype(np.int32)


# ------------------------------------------------------------------------------------------ program


def round_fn(config: Config, net, optimizer, axes):
    """`(params, opt_state, seed, round, index [n, J, B], data) -> params, opt_state, metrics`.

    With travelling statistics `params` are the whole variables.
    """
    n, devices = config.subnets, num_devices(config)
    worker = net.subnet(n) if config.divided else net
    travelling = config.normalization == "travelling"
    axis_name = None if config.devices == "one" else "workers"

    def update_fn(data):
        def loss_fn(params, batch):
            variables = params if travelling else {"params": params}
            mutable = ["batch_stats"] if travelling else []
            rngs = {"dropout": batch["key"]} if net.dropout else {}
            x, y = inputs(data, batch["index"]), psjax.data.take(data["y"], batch["index"])
            scores, moved = worker.apply(variables, x, train=True, mutable=mutable, rngs=rngs)
            loss = psjax.losses.nll_with_integer_labels(scores, y).mean()
            return (loss, moved) if travelling else loss

        if config.method == "local-sgd":
            return psjax.baselines.local_sgd(loss_fn, optimizer, axis_name=axis_name)
        if not config.divided:
            return psjax.baselines.data_parallel(loss_fn, optimizer, axis_name=axis_name)
        mutable = ("batch_stats",) if travelling else ()
        return psjax.local_update(loss_fn, optimizer, axis_name=axis_name, mutable=mutable)

    def one_round(params, opt_state, seed, round, index, data):
        batch = {"index": index}
        if net.dropout:
            key = jax.random.fold_in(jax.random.key(seed), round)
            batch["key"] = jax.random.split(key, index.shape[:2])
        if config.divided:
            drawn = 0 if config.method == "ist-fixed" else round
            selection = psjax.ist.membership(seed, drawn, axes, net.sizes, n, config.stratified)
        else:
            selection = psjax.replicas(params, n)
        if axis_name is None:
            return update_fn(data)(params, opt_state, selection, batch)
        mine, each = jax.lax.axis_index(axis_name), -(-n // devices)
        selection = jax.tree.map(lambda x: jnp.asarray(x)[mine], selection.split(devices))
        rows = jnp.minimum(mine * each + jnp.arange(each), n - 1)
        batch = jax.tree.map(lambda x: x[rows], batch)
        params, opt_state, metrics = update_fn(data)(params, opt_state, selection, batch)
        everyone = lambda x: jax.lax.all_gather(x, axis_name, tiled=True)[:n]
        return params, opt_state, jax.tree.map(everyone, metrics)

    return one_round


def rounds_fn(config: Config, one_round):
    """`(state, seeds, indices, first, count, data) -> state, metrics`: rounds of all seeds, jitted.

    Runs `count` rounds, numbered from `first`; both may be any number without a new compilation.
    Metrics are `loss [seeds, most_rounds, n]`, mean over the local steps, `finite` of the same
    shape, of which the first `count` rounds count, and `sound [seeds]`: no NaN in the state.
    """

    def one_seed(state, seed, indices, first, count, data):
        shape = indices.shape[:2]
        metrics = {"loss": jnp.zeros(shape), "finite": jnp.ones(shape, bool)}

        def body(i, carry):
            state, metrics = carry
            params, opt_state, own = one_round(
                state["params"], state["opt_state"], seed, first + i, indices[i], data
            )
            own = {"loss": own.loss.mean(axis=1), "finite": own.finite}
            metrics = jax.tree.map(lambda all, x: all.at[i].set(x), metrics, own)
            return {"params": params, "opt_state": opt_state}, metrics

        state, metrics = jax.lax.fori_loop(0, count, body, (state, metrics))
        return state, {**metrics, "sound": program.all_finite(state)}

    def rounds(state, seeds, indices, first, count, data, _=None):
        run = lambda state, seed, indices: one_seed(state, seed, indices, first, count, data)
        return program.over_seeds(run)(state, seeds, indices)

    if config.devices == "one":
        return jax.jit(rounds, donate_argnums=0)
    mesh = program.device_mesh(num_devices(config))
    if config.devices == "pmap":
        devices, axes = list(mesh.devices), (*[None] * 6, 0)
        how: Any = {"axis_name": "workers", "in_axes": axes, "out_axes": None}
        mapped = jax.pmap(rounds, devices=devices, **how)
        numbers = np.arange(len(devices))  # pmap wants one argument to map over
        return lambda *args: mapped(*args, numbers)
    # check_vma=False: parameters replicated in a loop's carry are not seen to stay so.
    sharded = jax.shard_map(rounds, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(sharded, donate_argnums=0)


def accuracy_fn(config: Config, net, normalized: bool):
    """`(params [seeds, ...], test, train, sample [K, B]) -> {column: accuracy [seeds]}`, jitted.

    `sample` are the training samples that the statistics of a `normalized` network are calibrated
    with.
    """

    def one(params, test, train, sample):
        variables = params if config.normalization == "travelling" else {"params": params}
        columns = {"test_accuracy": variables}
        if normalized:
            statistics = psjax.ist.calibrate(net, variables["params"], inputs(train, sample))
            columns["test_accuracy"] = {"params": variables["params"], "batch_stats": statistics}
        if config.normalization == "travelling":
            columns["test_accuracy_uncalibrated"] = variables
        scores = lambda variables, i: net.apply(variables, inputs(test, i))
        return {
            name: program.share_right(functools.partial(scores, variables), test["y"])
            for name, variables in columns.items()
        }

    def all_seeds(params, *data):
        return program.over_seeds(lambda p: one(p, *data))(params)

    return jax.jit(all_seeds)


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything a training loop calls."""

    net: Any
    state: dict[str, Any]
    stream: Stream
    rounds: Any
    """`(state, seeds, indices, first, count, train) -> state, metrics`."""
    evaluate: Callable[[Any], list[dict[str, float]]]
    """From the parameters of all seeds, columns of every seed."""
    seeds: Any
    train: dict[str, Any]


def build(config: Config, data_dir: str | None = None) -> Program:
    """Load the data, make the model and the compiled functions of a training."""
    dataset = config.dataset or "digits"
    train, num_classes = load(dataset, "train", data_dir)
    test, _ = load(dataset, "test", data_dir)
    net = make_model(config, num_classes)
    optimizer = make_optimizer(config, len(train["y"]))
    example = np.zeros((1, *train["x"].shape[1:]), np.float32)
    travelling = config.normalization == "travelling"
    axes, _ = program.shapes_of(net, example)
    own_axes = axes if travelling else axes["params"]

    def start(seed):
        variables = nn.unbox(net.init(jax.random.key(seed), example))
        trained = {"params": variables["params"]}
        if travelling:
            return {"params": variables, "opt_state": optimizer.init(trained)}
        return {**trained, "opt_state": optimizer.init(trained["params"])}

    stream = make_stream(config, len(train["y"]))
    seeds = np.asarray(stream.seeds, np.int32)
    state = initial_states(start, stream.seeds)
    rounds = rounds_fn(config, round_fn(config, net, optimizer, own_axes))
    sample = calibration_sample(stream.num_samples, config.calibration_batches)
    where = None  # else once on every device
    if config.devices != "one":
        where = NamedSharding(program.device_mesh(num_devices(config)), P())
    state, seeds, train, test, sample = jax.device_put((state, seeds, train, test, sample), where)
    accuracy = accuracy_fn(config, net, "batch_stats" in axes)

    def evaluate(params):
        found = jax.tree.map(np.asarray, accuracy(params, test, train, sample))
        return [{name: float(x[s]) for name, x in found.items()} for s in range(len(seeds))]

    return Program(net, state, stream, rounds, evaluate, seeds, train)
