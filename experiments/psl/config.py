"""What a training with a partially-separable loss may be asked to do, every option checked."""

import dataclasses

import psjax
from experiments._lib.config import check_options, check_seeds

MODELS = ("psnet", "lenet")
LOSSES = ("nll", "one-vs-all", "psl", "psl-squared", "psl-bounded", "one-vs-each", "squared-hinge")
COMPUTE = ("fused", "elements", "pairs", "blocks")
DEVICES = ("one", "pmap", "shard_map")
ORDERS = ("dataset", "fixed", "shuffled", "stratified")
OPTIMIZERS = ("adam", "adamw", "sgd", "momentum")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training."""

    dataset: str = "digits"
    """digits, or a TFDS image classification set such as mnist, fashion_mnist, cifar10, cifar100."""
    model: str = "psnet"
    """psnet or lenet."""
    preset: str | None = None
    """Size of the model: digits, mnist, mnist-53780, cifar10. Default: the one for the data set."""
    loss: str = "psl"
    """nll, one-vs-all, psl (6b), psl-squared (the authors' runs), psl-bounded, one-vs-each, squared-hinge."""
    compute: str = "elements"
    """fused (whole network), elements (C*C-C of them), pairs (h_kj and h_jk together), blocks (of --block-size classes)."""
    block_size: int = 4
    """Classes a block, with --compute blocks; cyclic blocks (4 classes of 10) are the fewest."""
    tile: int | None = None
    """With --compute elements: cut each label's samples into tiles of this many, so that work follows the true counts. Default: one row of slots a label."""
    devices: str = "one"
    """one, pmap or shard_map, over all devices there are."""
    batch_size: int = 100
    epochs: int = 100
    seeds: int = 1
    """Trainings with different initial weights (and order, unless --order dataset), in one program."""
    first_seed: int = 0
    optimizer: str = "adam"
    """adam, adamw, sgd or momentum (0.9)."""
    learning_rate: float = 5e-3
    b2: float = 0.999
    """Decay of Adam's second moment."""
    clip: float | None = None
    """Clip the gradient's global norm to this."""
    margin_bound: float | None = None
    """Beyond it the exponential losses go on as their tangent. Default: 40 (float32), out of reach; 4 for psl-bounded."""
    order: str = "shuffled"
    """dataset (the set's own, never reshuffled: the authors' way), fixed (a seed's own random order, never reshuffled), shuffled or stratified, anew every epoch."""

    def __post_init__(self):
        choices = {"model": MODELS, "loss": LOSSES, "compute": COMPUTE, "devices": DEVICES}
        choices |= {"order": ORDERS, "optimizer": OPTIMIZERS}
        least = {"epochs": 1, "batch_size": 1, "block_size": 2, "tile": 1, "learning_rate": 0}
        check_options(self, choices, least, positive=("clip", "margin_bound"))
        check_seeds(self.first_seed, self.seeds)
        if not 0 <= self.b2 < 1:
            msg = f"--b2 {self.b2}: write a number from 0 on and below 1."
            raise ValueError(msg)
        if self.compute != "fused" and self.loss in ("nll", "one-vs-all"):
            msg = f"--loss {self.loss} --compute {self.compute}: it has no pair elements; write --compute fused."
            raise ValueError(msg)
        if self.compute == "fused" and self.devices != "one":
            msg = f"--compute fused --devices {self.devices}: the fused loss is one element; write --devices one."
            raise ValueError(msg)
        if self.tile is not None and self.compute != "elements":
            msg = f"--tile {self.tile} --compute {self.compute}: write --compute elements."
            raise ValueError(msg)
        if self.loss not in ("nll", "one-vs-all"):
            psjax.losses.margin_function(self.loss, self.margin_bound)
