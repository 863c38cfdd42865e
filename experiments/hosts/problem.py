"""What is trained: a small configuration, the data, the model, and a worker's own rows of a batch.

Models and data are those of `experiments.ist` and `experiments.psl`.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import psjax
from experiments import _run
from experiments.ist import training as ist
from experiments.psl import training as psl

MODELS = ("mlp", "psnet")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training over many hosts."""

    method: str = "ist"
    """data-parallel, local-sgd or ist; with --model psnet also score-exchange and the plans
    elements, pairs, blocks and cyclic."""
    dataset: str = "digits"
    """digits, spoken_digit, mnist, or another set of experiments.ist."""
    model: str = "mlp"
    """mlp, or psnet for images."""
    width: int = 256
    """Neurons of every hidden layer of the mlp; for ist a multiple of workers squared."""
    depth: int = 2
    """Dense layers of the mlp; 2 are one hidden layer."""
    normalization: str = "batch"
    """batch or none, of the mlp: statistics of a worker's batch; calibrated before evaluation."""
    loss: str = "nll"
    """nll, or one of the partially-separable losses of experiments.psl (psl, psl-squared, ...)."""
    optimizer: str = "sgd"
    """sgd, momentum (0.9) or adam."""
    learning_rate: float = 0.1
    batch_size: int = 128
    """Samples of a local step of all workers together, so that it stays when workers are fewer."""
    block_size: int = 4
    """Classes a task, of --method blocks."""
    local_steps: int | None = None
    """J, steps of a round. Default: 10 for ist and local-sgd, which exchange once in it; else 1."""
    rounds: int = 200
    seed: int = 0
    workers: int | None = None
    """Workers, which is devices; on the CPU any number, spread over the processes. Default: one for
    every device there is."""
    float64: bool = False

    def __post_init__(self):
        for name, choices in (
            ("dataset", ist.DATASETS),
            ("model", MODELS),
            ("normalization", ("batch", "none")),
            ("loss", psl.LOSSES),
            ("optimizer", ("sgd", "momentum", "adam")),
        ):
            _run.check_choice(name, getattr(self, name), choices)
        for name, least in (
            ("width", 1),
            ("depth", 2),
            ("batch_size", 1),
            ("local_steps", 1),
            ("rounds", 1),
            ("workers", 1),
        ):
            _run.check_least(name, getattr(self, name), least)
        _run.check_positive("learning_rate", self.learning_rate)
        if not 0 <= self.seed < 2**31:
            msg = f"--seed {self.seed}: write a number between 0 and {2**31 - 1}."
            raise ValueError(msg)

    @property
    def steps(self) -> int:
        """J."""
        return self.local_steps or (10 if self.method in ("ist", "local-sgd") else 1)

    @property
    def dtype(self):
        return np.float64 if self.float64 else np.float32


@dataclasses.dataclass(frozen=True)
class Problem:
    """The data and the model, on the host: every process has them."""

    config: Config
    net: Any
    axes: Any
    """Names of the parameters' axes."""
    train: dict[str, Any]
    test: dict[str, Any]
    num_classes: int

    @property
    def normalized(self) -> bool:
        return self.config.model == "mlp" and self.config.normalization == "batch"

    def params(self) -> Any:
        """The initial parameters, from the seed, whole, as arrays of the host."""
        key, dtype = jax.random.key(self.config.seed), self.config.dtype
        params = jax.jit(lambda k: nn.unbox(self.net.init(k, self.example))["params"])(key)
        return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)

    @property
    def like(self) -> Any:
        """Shapes and dtypes of the parameters."""
        init = lambda: nn.unbox(self.net.init(jax.random.key(0), self.example))["params"]
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, self.config.dtype)
        return jax.tree.map(struct, jax.eval_shape(init))

    @property
    def example(self):
        return np.zeros((1, *self.train["x"].shape[1:]), self.config.dtype)

    def loss_fn(self, net):
        """`(params, {"x", "y"}) -> scalar` of a network, whole or a subnet."""
        per_sample = psl.sample_loss(psl.Config(loss=self.config.loss, compute="fused"))
        how = {"train": True} if self.config.model == "mlp" else {}

        def loss_fn(params, batch):
            return per_sample(net.apply({"params": params}, batch["x"], **how), batch["y"]).mean()

        return loss_fn

    def optimizer(self) -> optax.GradientTransformation:
        config = self.config
        rate = config.learning_rate
        return ist.make_optimizer(ist.Config(optimizer=config.optimizer, learning_rate=rate))

    @functools.cached_property
    def _stream(self):
        config, workers = self.config, self.config.workers or 1
        own = ist.Config(
            subnets=workers,
            width=max(config.width, workers),
            batch_size=config.batch_size // workers,
            local_steps=config.steps,
            epochs=1,
            first_seed=config.seed,
            normalization="none",
        )
        return ist.Stream(own, len(self.train["y"]))

    def samples(self, round: int) -> np.ndarray:
        """Which samples the workers' steps of a round see, from (seed, round) alone.

        int `[workers, J, B]`; a step of fewer workers sees the same samples.
        """
        return self._stream(round, round + 1)[0, 0]

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Inputs of some samples, `[*index.shape, ...]`."""
        train, dtype = self.train, self.config.dtype
        return train["x"][index].astype(dtype) * dtype(train["scale"]) + dtype(train["shift"])

    def labels(self, index: np.ndarray) -> np.ndarray:
        return self.train["y"][index]

    @functools.cached_property
    def _predict(self):
        scores = lambda variables, x: jnp.argmax(self.net.apply(variables, x), -1)
        calibrate = lambda params, sample: psjax.ist.calibrate(self.net, params, sample)
        return jax.jit(scores), jax.jit(calibrate)

    def accuracy(self, params: Any) -> float:
        """Of the whole network on the test set; statistics calibrated on 10 batches of 128."""
        predict, calibrate = self._predict
        variables = {"params": params}
        if self.normalized:
            count = min(10, len(self.train["y"]) // 128)
            order = np.random.default_rng(0).permutation(len(self.train["y"]))[: count * 128]
            variables["batch_stats"] = calibrate(params, self.rows(order.reshape(count, 128)))
        test, dtype, right = self.test, self.config.dtype, 0
        for x, y in _chunks(1000, test["x"], test["y"]):
            x = x.astype(dtype) * dtype(test["scale"]) + dtype(test["shift"])
            right += int(np.sum(np.asarray(predict(variables, x)) == y))
        return right / len(test["y"])

    def fingerprint(self) -> str:
        """Of the training data."""
        digest = hashlib.sha256()
        for name in ("x", "y", "scale", "shift"):
            x = np.ascontiguousarray(self.train[name])
            digest.update(f"{name} {x.dtype} {x.shape}".encode())
            digest.update(x.data)
        return digest.hexdigest()


def _chunks(size, *arrays):
    for i in range(0, len(arrays[0]), size):
        yield tuple(x[i : i + size] for x in arrays)


def load(config: Config, data_dir: str | None = None) -> Problem:
    """Load the data and make the model.

    Raises:
      ValueError: a psnet without images, a batch that the workers cannot divide equally.
    """
    if config.workers is not None and config.batch_size % config.workers:
        msg = (
            f"--batch-size {config.batch_size} --workers {config.workers}: write a batch that the "
            "workers can divide equally."
        )
        raise ValueError(msg)
    if config.model == "psnet" and config.dataset in ist.SPEECH:
        msg = f"--model psnet --dataset {config.dataset}: it needs images; write --model mlp."
        raise ValueError(msg)
    own = ist.Config(
        dataset=config.dataset,
        width=config.width,
        depth=config.depth,
        subnets=1,
        normalization=config.normalization,
    )
    train, num_classes = ist.load(own, "train", data_dir)
    test, _ = ist.load(own, "test", data_dir)
    if config.model == "mlp":
        net = ist.make_model(own, num_classes)
    else:
        net = psl.make_model(psl.Config(dataset=config.dataset), num_classes)
    example = jax.ShapeDtypeStruct((1, *train["x"].shape[1:]), config.dtype)
    variables = jax.eval_shape(net.init, jax.random.key(0), example)
    axes = nn.get_partition_spec(variables)["params"]
    return Problem(config, net, axes, train, test, num_classes)
