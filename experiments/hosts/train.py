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
import sys
import time
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

import experiments
import psjax
from experiments import _run
from experiments._checkpoint import Checkpoints
from experiments._signals import interruption
from experiments.hosts import _fault, _watch, cluster, methods, problem
from experiments.hosts.problem import Config

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
        _run.check_least(name, getattr(args, name), 1)
    if args.resume is not None and args.out is not None:
        msg = f"--out {args.out} --resume {args.resume}: write one of them."
        raise ValueError(msg)
    cluster.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        cluster=args.cluster,
        timeout=args.join_timeout,
        heartbeat=2 * args.deadline + 30,  # JAX's own end, should the watch have no say
    )
    with _watch.Watch(args.deadline, args.start_deadline) as watch:
        cluster.agree(asked(args), args.start_deadline, "asked")
        config, folder = args.config, args.resume or args.out
        if folder is None:
            if cluster.num_processes() > 1:
                msg = "write --out, the same run folder for every process."
                raise ValueError(msg)
            folder = _run.new_folder("hosts", config.dataset, config.method)
        train(config, folder, watch, args)
    return folder


def train(
    config: Config,
    folder: pathlib.Path,
    watch: _watch.Watch,
    args: Args,
    report=lambda line: print(line, file=sys.stderr, flush=True),
) -> list[dict]:
    """Train as `config` says; returns the rows of metrics.csv.

    A row has the `round`s and `samples` so far, the `train_loss` of the last round (mean over
    workers and local steps), `test_accuracy`, and the `seconds` of the rounds alone.

    Args:
      config: the training.
      folder: the run folder.
      watch: already entered.
      args: where to report, save and give up; whether to resume.
      report: told, a line at a time, what a person should know.

    Raises:
      NotFiniteError: a worker became NaN or Inf; the last good checkpoint stays.
      BlockingIOError: another process trains in the folder.
      OSError: a checkpoint cannot be written.
    """
    config, mesh = _devices(config)
    task = problem.load(config, args.data_dir)
    method = methods.make(task, mesh)
    cluster.agree(made(task, method), args.start_deadline, "made")
    with contextlib.ExitStack() as held:
        if cluster.process_id() == 0:
            resume = args.resume is not None
            held.enter_context(_run.hold_folder(config, folder, resume, _free))
        cluster.barrier("psjax/open", args.start_deadline)
        _check_shared(folder)
        return _train(config, folder, watch, args, task, method, mesh, report)


def _train(config, folder, watch, args, task, method, mesh, report):
    first = cluster.process_id() == 0
    state = method.init(task.params())
    report(_share(state, mesh))
    checkpoints = Checkpoints(
        folder / "checkpoints",
        unit="round",
        everybody=cluster.everybody,
        config=config,
        free=_free,
    )
    rows, start, seconds = [], 0, 0.0
    restored = checkpoints.restore(method.saved(state), report) if args.resume is not None else None
    if restored is not None:
        start, state = restored[0], method.loaded(restored[1])
        rows = [row for row in _rows(folder) if row["round"] <= start]
        seconds = rows[-1]["seconds"] if rows else 0.0
        if first:
            report(f"continuing after round {start}.")
    if start >= config.rounds:
        return rows
    step = method.step.lower(state, method.batch(start)).compile()
    cluster.barrier("psjax/compiled", args.start_deadline)
    bar = tqdm(
        total=config.rounds, initial=start, unit="round", desc=folder.name, disable=not first
    )
    with bar:
        for number in range(start, config.rounds):
            interruption.check()
            began = time.perf_counter()
            watch.at(number, "batch")
            _fault.at("compute", number, args.deadline, folder)
            batch = method.batch(number)
            watch.at(number, "step")
            _fault.at("collective", number, args.deadline, folder)
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds += time.perf_counter() - began
            bar.update()
            done = number + 1
            if done % args.report_every == 0 or done == config.rounds:
                watch.at(number, "report")
                loss = method.mean_loss(metrics)
                _check_finite(loss, number, checkpoints)
                params = method.whole(state, keep=first)
                if first:
                    row = {
                        "round": done,
                        "samples": done * config.steps * config.batch_size,
                        "train_loss": loss,
                        "test_accuracy": task.accuracy(params),
                        "seconds": seconds,
                    }
                    rows.append(row)
                    _run.write_rows(folder / "metrics.csv", rows)
                    bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{row['test_accuracy']:.4f}")
                    if done == config.rounds:
                        _write_params(folder / "params.npz", params)
            if done % args.checkpoint_every == 0 or done == config.rounds:
                watch.at(number, "save")
                _fault.at("saving", number, args.deadline, folder)
                checkpoints.save(done, method.saved(state))
    if first and rows:
        report(f"test accuracy {rows[-1]['test_accuracy']:.4f}; run folder {folder}")
    return rows


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


def _rows(folder):
    path = folder / "metrics.csv"
    return _run.read_rows(path) if path.exists() else []


def _check_finite(loss, number, checkpoints):
    if not np.isfinite(loss):
        last = checkpoints.steps()
        msg = (
            f"round {number}: a worker became NaN or Inf. The last good checkpoint is that of "
            f"round {last[-1] if last else 0}; try a lower --learning-rate."
        )
        raise _run.NotFiniteError(msg)


def _write_params(path, params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    aside = path.with_suffix(".tmp.npz")
    np.savez(aside, **{jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves})
    os.replace(aside, path)


if __name__ == "__main__":
    _run.run_script(main, Args, __doc__, "continue with --resume and the run folder.")
