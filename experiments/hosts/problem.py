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
from experiments._lib import program
from experiments._lib.config import check_options
from experiments.ist import training as ist
from experiments.psl import training as psl

MODELS = ("mlp", "psnet")
OPTIMIZERS = ("sgd", "momentum", "adam")


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
        choices = {"dataset": ist.DATASETS, "model": MODELS, "normalization": ("batch", "none")}
        choices |= {"loss": psl.LOSSES, "optimizer": OPTIMIZERS}
        least = {"width": 1, "depth": 2, "batch_size": 1, "local_steps": 1, "rounds": 1}
        check_options(self, choices, {**least, "workers": 1}, positive=("learning_rate",))
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
    like: Any
    """Shapes and dtypes of the parameters."""
    train: dict[str, Any]
    test: dict[str, Any]
    num_classes: int

    @property
    def normalized(self) -> bool:
        return self.config.model == "mlp" and self.config.normalization == "batch"

    def params(self) -> Any:
        """The initial parameters, from the seed, whole, as arrays of the host."""
        example = self.inputs(self.train, slice(1))
        init = jax.jit(lambda key: nn.unbox(self.net.init(key, example))["params"])
        params = init(jax.random.key(self.config.seed))
        return jax.tree.map(lambda x: np.asarray(x).astype(self.config.dtype), params)

    def loss_fn(self, net):
        """`(params, {"x", "y"}) -> scalar` of a network, whole or a subnet."""
        per_sample = psl.sample_loss(self.config.loss)
        how = {"train": True} if self.config.model == "mlp" else {}

        def loss_fn(params, batch):
            return per_sample(net.apply({"params": params}, batch["x"], **how), batch["y"]).mean()

        return loss_fn

    def optimizer(self) -> optax.GradientTransformation:
        return program.make_optimizer(self.config.optimizer, self.config.learning_rate)

    @functools.cached_property
    def _stream(self):
        config, workers = self.config, self.config.workers or 1
        shape = config.steps, workers, config.batch_size // workers
        seeds = range(config.seed, config.seed + 1)
        return ist.Stream(len(self.train["y"]), shape, epochs=1, seeds=seeds)

    def samples(self, round: int) -> np.ndarray:
        """Which samples the workers' steps of a round see, from (seed, round) alone.

        int `[workers, J, B]`; a step of fewer workers sees the same samples.
        """
        return self._stream(round, round + 1)[0, 0]

    def inputs(self, data: dict[str, Any], index) -> np.ndarray:
        """Inputs of some samples of `train` or `test`, `[*index.shape, ...]`."""
        dtype = self.config.dtype
        return data["x"][index].astype(dtype) * dtype(data["scale"]) + dtype(data["shift"])

    @functools.cached_property
    def _predict(self):
        predict = lambda variables, x: jnp.argmax(self.net.apply(variables, x), -1)
        calibrate = lambda params, sample: psjax.ist.calibrate(self.net, params, sample)
        return jax.jit(predict), jax.jit(calibrate)

    def accuracy(self, params: Any, batch_size: int = 1000) -> float:
        """Of the whole network on the test set; statistics calibrated on 10 batches of 128."""
        predict, calibrate = self._predict
        variables, labels = {"params": params}, self.test["y"]
        if self.normalized:
            sample = ist.calibration_sample(len(self.train["y"]), 10)
            variables["batch_stats"] = calibrate(params, self.inputs(self.train, sample))
        parts = (slice(i, i + batch_size) for i in range(0, len(labels), batch_size))
        best = [np.asarray(predict(variables, self.inputs(self.test, part))) for part in parts]
        return float(np.mean(np.concatenate(best) == labels))

    def fingerprint(self) -> str:
        """Of the training data."""
        digest = hashlib.sha256()
        for name in ("x", "y", "scale", "shift"):
            x = np.ascontiguousarray(self.train[name])
            digest.update(f"{name} {x.dtype} {x.shape}".encode())
            digest.update(x.data)
        return digest.hexdigest()


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
    train, num_classes = ist.load(config.dataset, "train", data_dir)
    test, _ = ist.load(config.dataset, "test", data_dir)
    if config.model == "mlp":
        hidden, normalize = (config.width,) * (config.depth - 1), config.normalization == "batch"
        how: Any = {"normalize": normalize, "normalize_output": normalize}
        net = psjax.models.MLP(num_classes=num_classes, hidden=hidden, **how)
    else:
        net = psl.make_model(config.dataset, num_classes)
    example = jax.ShapeDtypeStruct((1, *train["x"].shape[1:]), config.dtype)
    axes, shapes = (tree["params"] for tree in program.shapes_of(net, example))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.dtype), shapes)
    return Problem(config, net, axes, like, train, test, num_classes)
