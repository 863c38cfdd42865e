r"""Train over many processes, with the weights in shards (the default: digits, one process).

In each of two terminals, perhaps on two hosts that share a file system, with process 0's address
and --process-id 0 or 1:

    python -m experiments.hosts.train --out runs/a --coordinator HOST:1234 --num-processes 2 \
        --process-id 0

One host, and what else there is:

    python -m experiments.hosts.train --workers 4                        # 4 virtual devices
    python -m experiments.hosts.launch --processes 4 -- --method ist     # 4 local processes
    python -m experiments.hosts.train --cluster slurm                    # within srun
    python -m experiments.hosts.train --resume runs/hosts-...            # any number of processes

The run folder gets config.json, metrics.csv, checkpoints/ and, in the end, params.npz, all from
process 0 but the checkpoints: of ist every process writes its shards; of plans and score exchange
they hold the whole weights, which every process has while one is made. It must be the same folder
for all processes. If a process dies, stops or is cut off, the others say which and end with exit
code 75 (try again) within --deadline; the same command with --resume goes on. A process that fails
by itself ends with 78 (it would again), and so do all where they do not train the same.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import experiments
import psjax
from experiments._lib import loop
from experiments._lib.checkpoint import Checkpoints
from experiments._lib.command import check_one_folder, run_script
from experiments._lib.config import check_least
from experiments._lib.folder import hold_folder, new_folder
from experiments.faults import inject
from experiments.hosts import cluster, methods, problem
from experiments.hosts.problem import Config
from experiments.hosts.watch import Watch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


@dataclasses.dataclass
class Args:
    """Train over many processes."""

    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    coordinator: str | None = None
    """Address of process 0, host:port, the same in every process."""
    num_processes: int | None = None
    process_id: int | None = None
    cluster: str | None = None
    """Instead of the three: auto, slurm, ompi, k8s or mpi4py, by JAX's own detection."""
    out: pathlib.Path | None = None
    """Run folder; must not exist. With many processes write it, the same in each."""
    resume: pathlib.Path | None = None
    """Run folder to continue, with its own configuration; --rounds may differ, --workers too but of
    ist and local-sgd, and one plan (elements, pairs, blocks, cyclic) may go on as another."""
    checkpoint_every: int = 50
    """Rounds between checkpoints."""
    report_every: int = 20
    """Rounds between rows of metrics.csv."""
    deadline: float = 60
    """Seconds within which a round, a report or a checkpoint must end."""
    start_deadline: float = 300
    """Seconds for the start: data and compilation."""
    join_timeout: float = 60
    """Seconds within which all processes must have come."""
    data_dir: str | None = None
    """Where TFDS keeps its sets. Default: TFDS_DATA_DIR, else TFDS's own."""


OWN = ("coordinator", "num_processes", "process_id", "cluster", "data_dir")
"""Arguments that a process may have for itself."""


def main(args: Args) -> pathlib.Path:
    """Join the others, train, return the run folder."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax: pages about what one line says
    methods.check(args.config.method)
    for name in ("checkpoint_every", "report_every"):
        check_least(name, getattr(args, name), 1)
    check_one_folder(args.out, args.resume)
    cluster.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        cluster=args.cluster,
        timeout=args.join_timeout,
        heartbeat=2 * args.deadline + 30,  # JAX's own end, should the watch have no say
    )
    with Watch(args.deadline, args.start_deadline) as watch:
        cluster.agree(asked(args), args.start_deadline, "asked")
        config, folder = args.config, args.resume or args.out
        if folder is None:
            if cluster.num_processes() > 1:
                msg = "write --out, the same run folder for every process."
                raise ValueError(msg)
            folder = new_folder("hosts", config.dataset, config.method)
        train(config, folder, watch, args)
    return folder


def train(config: Config, folder: pathlib.Path, watch: Watch, args: Args) -> list[dict]:
    """Train as `config` says; returns the rows of metrics.csv, which only process 0 has.

    Args:
      config: the training.
      folder: the run folder.
      watch: already entered.
      args: where to report, save and give up; whether to resume.

    Raises:
      NotFiniteError: a worker became NaN or Inf; the last good checkpoint stays.
      BlockingIOError: another process trains in the folder.
      OSError: a checkpoint cannot be written.
    """
    config, mesh = _devices(config)
    task = problem.load(config, args.data_dir)
    method = methods.make(task, mesh)
    cluster.agree(made(task, method), args.start_deadline, "made")
    resume, first = args.resume is not None, cluster.process_id() == 0
    with contextlib.ExitStack() as held:
        if first:
            held.enter_context(hold_folder(config, folder, resume, _free))
        cluster.barrier("psjax/open", args.start_deadline)
        _check_shared(folder)
        everyone: dict[str, Any] = {"unit": "round", "everybody": cluster.everybody}
        checkpoints = Checkpoints(folder / "checkpoints", config=config, free=_free, **everyone)
        rounds = Rounds(task, method, folder, watch, args)
        loop.say(_share(rounds.state, mesh))
        how: dict[str, Any] = {"resume": resume, "checkpoint_every": args.checkpoint_every}
        rows = loop.run(rounds, folder, checkpoints, **how)
    if first and rows:
        loop.say(f"test accuracy {rows[-1]['test_accuracy']:.4f}; run folder {folder}")
    return rows


class Rounds(loop.Training):
    """A step of the loop is a round of all workers. Messages count rounds from 0, rows from 1.

    A row has the `round`s and `samples` so far, the `train_loss` of the last round (mean over
    workers and local steps), `test_accuracy`, and the `seconds` of the rounds alone.
    """

    unit = "round"

    def __init__(self, task, method, folder, watch: Watch, args: Args):
        self.task, self.method, self.folder = task, method, folder
        self.watch, self.args = watch, args
        self.state, self.total = method.init(task.params()), task.config.rounds
        self.silent = cluster.process_id() != 0

    def prepare(self, state, start):
        self.step = self.method.step.lower(state, self.method.batch(start)).compile()
        cluster.barrier("psjax/compiled", self.args.start_deadline)
        return state

    def _at(self, number, doing, place):
        """Say where this process is, and meet the fault that a test has put there."""
        self.watch.at(number, doing)
        inject.at(place, number, self.args.deadline, self.folder)

    def advance(self, state, before, step):
        self._at(before, "batch", "compute")
        batch = self.method.batch(before)
        self._at(before, "step", "collective")
        return jax.block_until_ready(self.step(state, batch))

    def reports(self, step):
        return step % self.args.report_every == 0 or step == self.total

    def report(self, state, before, step, metrics, rows, seconds):
        self.watch.at(before, "report")
        loss = self.method.mean_loss(metrics)
        if not np.isfinite(loss):
            msg = f"round {before}: a worker became NaN or Inf"
            raise loop.NotFiniteError(msg)
        params = self.method.whole(state, keep=not self.silent)
        if self.silent:
            return []
        if step == self.total:
            _write_params(self.folder / "params.npz", params)
        config = self.task.config
        row = {
            "round": step,
            "samples": step * config.steps * config.batch_size,
            "train_loss": loss,
            "test_accuracy": self.task.accuracy(params),
            "seconds": seconds,
        }
        return [row]

    def saved(self, state, step):
        if step:
            self._at(step - 1, "save", "saving")
        return self.method.saved(state)

    def loaded(self, saved):
        return self.method.loaded(saved)


def asked(args: Args) -> dict[str, Any]:
    """What all processes must have the same before any of them begins."""
    rest = {name: x for name, x in vars(args).items() if name not in ("config", *OWN)}
    return {
        "configuration": dataclasses.asdict(args.config),
        "arguments": {name: str(x) for name, x in rest.items()},
        "processes": cluster.num_processes(),
        "version": version(),
    }


def made(task: problem.Problem, method: methods.Method) -> dict[str, Any]:
    """And what they have made of it; of a resumed training the configuration is the folder's."""
    configuration = dataclasses.asdict(task.config)
    return {"configuration": configuration, "plan": method.plan, "data": task.fingerprint()}


def version() -> dict[str, str]:
    """psjax's, those of the packages below it, and a digest of the source files that run."""
    digest = hashlib.sha256()
    for module in (psjax, experiments):
        folder = pathlib.Path(str(module.__file__)).resolve().parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"psjax": psjax.__version__, **packages, "source": digest.hexdigest()[:16]}


def _devices(config):
    """The number of workers, and their mesh; on the CPU as many devices as that needs."""
    if config.workers is not None:
        each = -(-config.workers // cluster.num_processes())
        jax.config.update("jax_num_cpu_devices", each)
    if config.float64:
        jax.config.update("jax_enable_x64", True)
    mesh = methods.workers_mesh(config.workers)
    return dataclasses.replace(config, workers=mesh.size), mesh


def _free(old, new):
    """What may differ between the configurations of one training."""
    free = {"rounds"}
    if new["method"] in methods.SUMS:
        free |= {"workers"}
    if {old["method"], new["method"]} <= methods.PLANS:  # the same sum in another order
        free |= {"method", "block_size"}
    return free


def _check_shared(folder):
    """Whether this process sees the run folder that process 0 has opened."""
    if not (folder / "config.json").is_file():
        msg = (
            f"process {cluster.process_id()} does not see run folder {folder}; write a folder on a "
            "file system that all hosts share"
        )
        raise cluster.ClusterError(msg)


def _share(state, mesh):
    """What of the state this process holds."""
    leaves = jax.tree.leaves(state)
    whole = sum(x.nbytes for x in leaves)
    own = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
    local = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
    return (
        f"process {cluster.process_id()} of {cluster.num_processes()}: workers {local[0]} to "
        f"{local[-1]} of {mesh.size}, {own} of {whole} bytes of the state"
    )


def _write_params(path, params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    aside = path.with_suffix(".tmp.npz")
    np.savez(aside, **{jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves})
    os.replace(aside, path)


if __name__ == "__main__":
    run_script(main, Args, __doc__, "continue with --resume and the run folder.")
