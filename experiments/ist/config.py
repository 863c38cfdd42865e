"""What a training in independent subnets may be asked to do, every option checked."""

import dataclasses

from experiments._lib.config import check_options, check_seeds

METHODS = ("ist", "ist-fixed", "local-sgd", "data-parallel", "data-parallel-dropout")
MODELS = {"mlp": (2, 1024), "vgg11": (3, 4096)}  # dense layers, neurons of each hidden one
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "adam-entry")
NORMALIZATIONS = ("batch", "none", "travelling")
DEVICES = ("one", "pmap", "shard_map")
SPEECH = {
    "spoken_digit": {},
    "speech_commands": {},
    "speech_commands_words": {"labels": "words", "split_by": "hash", "only_full": True},
}
DATASETS = ("digits", *SPEECH, "mnist", "fashion_mnist", "cifar10", "cifar100")
IMAGES_OF_32 = ("cifar10", "cifar100")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training."""

    dataset: str | None = None
    """digits, spoken_digit, speech_commands (12 labels), speech_commands_words (the paper's 35, its
    code's split; --data-dir is the unpacked archive), mnist, fashion_mnist, cifar10 or cifar100.
    Default: spoken_digit where it is prepared, else digits."""
    method: str = "ist"
    """ist; ist-fixed (the subnets of the first round for ever); local-sgd; data-parallel;
    data-parallel-dropout (hidden neurons dropped at the rate 1 - 1/n)."""
    subnets: int = 4
    """n, subnets or workers."""
    local_steps: int = 10
    """J, steps between two exchanges (data-parallel exchanges at every step)."""
    model: str = "mlp"
    """mlp, or vgg11 for images of 32x32."""
    depth: int | None = None
    """Dense layers; 2 are one hidden layer. Default: 2, for vgg11 3."""
    width: int | None = None
    """Neurons of every hidden dense layer. Default: 1024, for vgg11 4096."""
    normalization: str = "batch"
    """batch: statistics calibrated with the whole network before every evaluation. none: dense
    layers with biases (vgg11 still normalises its convolutions). travelling: as batch, and also
    running statistics that travel with the subnets, whose accuracy is a column of its own."""
    normalize_output: bool = True
    """Normalise the scores too, without scale and shift, as the paper's public code does."""
    scale_shift: bool = True
    """Learn a scale and a shift of every normalised hidden neuron."""
    calibration_batches: int = 10
    """Batches of 128 training samples that the statistics are computed from."""
    stratified: bool = False
    """Every owner of 1/n of the neurons divides its own equally among the subnets."""
    optimizer: str = "sgd"
    """sgd, momentum (0.9), adam, adamw or adam-entry (a count of steps for every entry)."""
    learning_rate: float = 1e-2
    decay_after: int | None = None
    """Epochs after which the learning rate is a tenth (the paper's VGG11: 30). Default: never."""
    clip: float | None = None
    """Clip the global norm of every subnet's gradient (data-parallel: the mean one) to this."""
    batch_size: int = 128
    """B, samples of one worker's step."""
    epochs: int = 100
    seeds: int = 1
    """Trainings with different initial weights, subnets and order, in one program."""
    first_seed: int = 0
    devices: str = "one"
    """one, pmap or shard_map, over all devices there are, at most n."""

    def __post_init__(self):
        choices = {"method": METHODS, "model": tuple(MODELS), "normalization": NORMALIZATIONS}
        choices |= {"optimizer": OPTIMIZERS, "devices": DEVICES}
        choices |= {} if self.dataset is None else {"dataset": DATASETS}
        least = {"subnets": 1, "local_steps": 1, "depth": 2, "width": 1, "calibration_batches": 1}
        least |= {"batch_size": 1 if self.normalization == "none" else 2, "epochs": 1}
        check_options(self, choices, {**least, "decay_after": 1, "learning_rate": 0}, ("clip",))
        check_seeds(self.first_seed, self.seeds)
        if self.model == "vgg11" and self.dataset not in IMAGES_OF_32:
            msg = (
                f"--model vgg11 --dataset {self.dataset}: it needs images of 32x32; write "
                f"--dataset {' or '.join(IMAGES_OF_32)}."
            )
            raise ValueError(msg)
        if self.normalization == "travelling" and not self.divided:
            msg = (
                f"--normalization travelling --method {self.method}: statistics travel with "
                "subnets; write --method ist or ist-fixed."
            )
            raise ValueError(msg)
        n, width = self.subnets, self.hidden[0]
        if self.divided and n > width:
            msg = (
                f"--subnets {n}: the hidden layers have {width} neurons; write {width} or fewer, "
                "or a larger --width."
            )
            raise ValueError(msg)
        if self.stratified and (not self.divided or width % n**2):
            msg = (
                f"--stratified --method {self.method} --subnets {n}: {width} neurons; write "
                "--method ist and a --width that is n blocks of n neurons or more."
            )
            raise ValueError(msg)

    @property
    def divided(self) -> bool:
        """Whether workers hold subnets; else all hold the whole network."""
        return self.method.startswith("ist")

    @property
    def hidden(self) -> tuple[int, ...]:
        """Neurons of every hidden dense layer."""
        depth, width = MODELS[self.model]
        return (self.width or width,) * ((self.depth or depth) - 1)
