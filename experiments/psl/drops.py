"""Why the accuracy drops suddenly under PSL, and what prevents it.

P. Raynaud, D. Orban, J. Bigeon, G-2023-36, section 7: "the training of LeNet-PSL exhibits high
standard deviation errors. Raw results indicate consistent drops in accuracy (down to 20%) [...].
Investigating this behavior is a topic for future research."

The mechanism looked for here: the loss of a sample is 1/p - 1 with p the probability of its label
(of doubled scores, as the authors ran it), so its gradient is that of NLL times 1/p, without a
bound. Once a network fits its training set, one sample that it gets confidently wrong has a
gradient G = 1000 times the usual or more. Adam turns any such outlier into the same kick,
1/sqrt(1 - b2) = 32 learning rates in every coordinate, and its second moment, now too large, keeps
the steps below half their length for 2 ln(G sqrt(1 - b2) / 2) / (1 - b2) steps, some epochs. Each
variant takes one link out of this chain.

    python -m experiments.psl.drops                              # LeNet, CIFAR10, batches of 20
    python -m experiments.psl.drops --model psnet --dataset mnist
    python -m experiments.psl.drops --trace psl-squared          # one drop, step by step
    python -m experiments.psl.drops --kicks --dataset mnist --variants psl-squared nll
    python -m experiments.psl.drops --plot                       # figures and drops.md again

About 3 seconds an epoch and seed on one core (LeNet, CIFAR10, batches of 20). A training that was
interrupted goes on where it was; what `reproduce` has already measured is not run again. Rows,
figures and drops.md go to `runs/results/psl/`, which begins as a copy of
`experiments/psl/results/`; with `--commit-results` to the latter.
"""

import dataclasses
import functools
import pathlib
import sys

from experiments._lib.command import run_script
from experiments._lib.folder import results_folder
from experiments._lib.loop import NotFiniteError
from experiments._lib.tables import markdown, mean_std, read_rows, write_rows
from experiments.psl import drop_counts, drop_steps, figures, reproduce, run, training
from experiments.psl.drop_counts import VARIANTS

CLIP_FACTOR = 10  # times the median gradient norm of the first epoch


@dataclasses.dataclass
class Args:
    """Count the drops of accuracy under variants of PSL, or trace one of them."""

    model: str = "lenet"
    """lenet or psnet."""
    dataset: str = "cifar10"
    batch_size: int = 20
    epochs: int = 50
    seeds: int = 3
    first_seed: int = 0
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which to train."""
    trace: str | None = None
    """Train only this variant, with --first-seed, past its first drop, recording every step."""
    kicks: bool = False
    """Train the variants with --first-seed, recording in every epoch the largest step."""
    plot: bool = False
    """Train nothing; draw the figures and write drops.md."""
    out: pathlib.Path = pathlib.Path("runs/drops")
    """Where run folders go."""
    results: pathlib.Path | None = None
    """Where rows, figures and drops.md go. Default: runs/results/psl."""
    commit_results: bool = False
    """Write to experiments/psl/results."""
    data_dir: str | None = None

    @property
    def setting(self) -> str:
        return f"{self.model}-{self.dataset}-{self.batch_size}"

    @functools.cached_property
    def where(self) -> pathlib.Path:
        """The folder of the results."""
        return results_folder(reproduce.RESULTS, self.commit_results, self.results)


# ----------------------------------------------------------------------------------------- training


def config_of(args: Args, variant: str) -> training.Config:
    """The training of a variant, otherwise the authors' form; for `clip` a first epoch is run."""
    own = {"epochs": args.epochs, "seeds": args.seeds, "first_seed": args.first_seed}
    own |= VARIANTS[variant][1]
    config = reproduce.authors_form(args.model, args.dataset, args.batch_size, **own)
    if variant != "clip":
        return config
    first = dataclasses.replace(config, epochs=1, seeds=1, first_seed=0)
    folder = args.out / f"{args.setting}-first-epoch"
    (row,) = run.train(first, folder, resume=folder.exists(), data_dir=args.data_dir)
    # Two digits, so that every machine finds the same.
    return dataclasses.replace(config, clip=float(f"{CLIP_FACTOR * row['median_grad_norm']:.2g}"))


def collect(args: Args, variant: str) -> list[dict]:
    """Rows of a variant, of each seed its longest run: from `results`, run folders, `reproduce`."""
    path = args.where / f"drops-{args.setting}-{variant}.csv"
    folders = args.out.glob(f"{args.setting}-{variant}-seeds*/metrics.csv")
    sources = [read_rows(p) for p in [path, *sorted(folders)]]
    loss = {"psl-squared": "psl-squared", "nll": "nll"}.get(variant)
    for name, (network, its_loss, dataset, batch_size) in reproduce.SETTINGS.items():
        own = reproduce.NETWORKS[network], reproduce.DATASETS[dataset], batch_size
        if (*own, reproduce.LOSSES[its_loss]) == (args.model, args.dataset, args.batch_size, loss):
            folders = {reproduce.RESULTS, args.where}
            sources += [figures.load(folder).get(name, []) for folder in sorted(folders)]
    longest: dict[int, list[dict]] = {}
    for rows in sources:
        for seed in {row["seed"] for row in rows}:
            own = [row for row in rows if row["seed"] == seed]
            if len(own) > len(longest.get(seed, ())):
                longest[seed] = own
    rows = [row for own in longest.values() for row in own]
    rows.sort(key=lambda row: (row["epoch"], row["seed"]))
    if rows:
        write_rows(path, rows)
    return rows


def train(args: Args, variant: str) -> None:
    """Train the seeds of a variant that are not there yet."""
    last: dict[int, int] = {}
    for row in collect(args, variant):
        last[row["seed"]] = max(row["epoch"], last.get(row["seed"], 0))
    asked = range(args.first_seed, args.first_seed + args.seeds)
    missing = [seed for seed in asked if last.get(seed, 0) < args.epochs]
    if not missing:
        return
    config = dataclasses.replace(
        config_of(args, variant), first_seed=missing[0], seeds=missing[-1] - missing[0] + 1
    )
    folder = args.out / f"{args.setting}-{variant}-seeds{missing[0]}-{missing[-1]}"
    try:
        run.train(config, folder, resume=folder.exists(), data_dir=args.data_dir)
    except NotFiniteError as error:  # also a result; the rows until then stay
        print(f"{folder.name}: {error}", file=sys.stderr)
    finally:
        collect(args, variant)


# ------------------------------------------------------------------------------------ report, main


def table(results: pathlib.Path) -> str:
    """Drops, their price and their spikes, as Markdown; also into `drops.md`."""
    lines = ["# Drops of accuracy", "", drop_counts.DEFINITION]
    for setting, variants in drop_counts.load(results).items():
        lines += ["", f"## {drop_counts.describe(setting)}", ""]
        rows = [
            {
                "variant": VARIANTS[variant][0],
                **s.drop_cells(),
                "last accuracy, %": mean_std(s.last),
                "best accuracy, %": mean_std(s.best),
                **s.spike_cells(),
            }
            for variant, s in variants.items()
        ]
        lines.append(markdown(rows))
    for title, more in (
        ("All settings of figures 6 and 7", drop_counts.settings_table(results)),
        ("Steps, root mean square in learning rates", drop_steps.kicks_table(results)),
    ):
        lines += ["", f"## {title}", "", more] if more else []
    for path in sorted(results.glob("drops_trace-*.csv")):
        title, _ = drop_steps.trace_title(path)
        lines += ["", f"**{title}.** {drop_steps.trace_summary(read_rows(path))}"]
    text = "\n".join(lines) + "\n"
    (results / "drops.md").write_text(text)
    return text


def report(results: pathlib.Path) -> None:
    """All figures and `drops.md`, from what is in `results`."""
    table(results)
    drop_counts.draw_frequency(results)
    traces = sorted(results.glob("drops_trace-*.csv"))
    if traces:
        drop_steps.draw_trace(traces[0], results / "drops_trace.png")


def main(args: Args) -> None:
    unknown = sorted({*args.variants, args.trace or args.variants[0]} - set(VARIANTS))
    if unknown:
        msg = f"variant {' '.join(unknown)}: there is none; write some of {', '.join(VARIANTS)}."
        raise SystemExit(msg)
    results = args.where
    results.mkdir(parents=True, exist_ok=True)
    if args.trace is not None:
        rows = drop_steps.trace(config_of(args, args.trace), data_dir=args.data_dir)
        if not rows:
            msg = f"no drop in {args.epochs} epochs; write more --epochs or another --first-seed."
            raise SystemExit(msg)
        path = results / f"drops_trace-{args.setting}-{args.trace}-{args.first_seed}.csv"
        write_rows(path, rows)
        drop_steps.draw_trace(path, results / "drops_trace.png")
        print(table(results))
        return
    for variant in args.variants:
        if args.kicks:
            rows = drop_steps.kicks(config_of(args, variant), args.data_dir)
            name = f"drops_kicks-{args.setting}-{variant}-{args.first_seed}.csv"
            write_rows(results / name, rows)
        elif args.plot:
            collect(args, variant)
        else:
            train(args, variant)
            report(results)
    report(results)
    print(table(results))


if __name__ == "__main__":
    run_script(main, Args, __doc__)
