"""The network decides: trainings over 2 and 4 hosts at 100 Mbit/s, 1 Gbit/s and 10 Gbit/s.

Needs root on Linux: the hosts are network namespaces on one machine, the rates are the token bucket
filter's (tc). Nothing of the training differs from that on real hosts but that they share this
machine's cores.

    python -m experiments.benchmarks.network                # everything, about half an hour
    python -m experiments.benchmarks.network --datasets digits --hosts 2 --out runs/network.csv
    python -m experiments.benchmarks.network --plot         # tables and figure of what was measured

Everything goes to `runs/results/benchmarks/`, which begins as a copy of `results/`; with
`--commit-results` to `results/` and into NETWORK.md, which says what is measured and what came out.
What is in the CSV already is not measured again; an interruption loses the rates of one method.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

from experiments._lib.command import run_script
from experiments._lib.figures import panel, save
from experiments._lib.folder import replace, results_folder
from experiments._lib.tables import markdown, paste, read_mixed, write_rows
from experiments.benchmarks.network_worker import row_of
from experiments.faults import namespaces
from experiments.hosts import launch

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
CSV = RESULTS / "network.csv"
PAGE = HERE / "NETWORK.md"
PORT = 12300
TARGETS = (0.80, 0.90, 0.95)
# One thread a host: they share the cores.
ALONE = "env JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false"


COPIED = ("loss", "learning_rate", "batch_size")


SUBNETS = {
    "data-parallel": {"method": "data-parallel"},
    "data-parallel-scaled": {"method": "data-parallel", "scaled": True},
    "local-sgd": {"method": "local-sgd"},
    "ist": {"method": "ist"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained on a data set."""

    config: dict[str, Any]
    """Of `experiments.hosts.problem.Config`."""
    cap: float
    """Seconds of the training's clock after which it is given up."""
    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: SUBNETS)
    """What is trained, and what of the configuration it has for itself."""
    batch_size: int = 128
    """Samples of a gradient step: of one host, or of all together."""
    of_a_host: bool = True
    report_steps: int = 10
    """Gradient steps between two looks at the accuracy."""
    trained_at: tuple[float, ...] | None = None
    """Rates at which it trains to the accuracy; None: at all. Elsewhere steps are only timed: the
    numbers that are computed do not depend on the rate."""
    never_trained: tuple[str, ...] = ()
    timed_steps: int = 100


MLP = {"model": "mlp", "learning_rate": 0.01, "optimizer": "sgd", "rounds": 10_000, "loss": "nll"}
PSNET = {"model": "psnet", "learning_rate": 1e-3, "optimizer": "adam", "rounds": 10_000}
CASES = {
    "spoken_digit": Case({**MLP, "dataset": "spoken_digit", "width": 1024}, cap=200),
    "mnist": Case(
        {**MLP, "dataset": "mnist", "width": 1024}, cap=40, trained_at=(10_000,), timed_steps=30
    ),
    "mnist-psnet": Case(
        {**PSNET, "dataset": "mnist"},
        cap=60,
        methods={
            "data-parallel": {"method": "data-parallel", "loss": "nll"},
            "data-parallel-psl": {"method": "data-parallel", "loss": "psl"},
            "cyclic": {"method": "cyclic", "loss": "psl"},
            "pairs": {"method": "pairs", "loss": "psl"},
            "score-exchange": {"method": "score-exchange", "loss": "nll"},
        },
        batch_size=100,
        of_a_host=False,
        report_steps=100,
        trained_at=(10_000,),
        never_trained=("pairs",),  # takes the steps of the cyclic plan
    ),
    "digits": Case({**MLP, "dataset": "digits", "width": 4096}, cap=5),  # small, to try
}
NAMES = {
    "data-parallel": "data parallel",
    "data-parallel-scaled": "data parallel, rate times hosts",
    "data-parallel-psl": "data parallel, PSL",
    "local-sgd": "local SGD, J = 10",
    "ist": "IST, J = 10",
    "cyclic": "PSL, cyclic plan",
    "pairs": "PSL, merged pairs",
    "score-exchange": "score exchange",
}
PALETTE = ("#0072B2", "#56B4E9", "#999999", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#009E73")
COLOURS = dict(zip(NAMES, PALETTE))


@dataclasses.dataclass
class Args:
    """Measure trainings over hosts with slow links: bytes, times, and time to accuracy."""

    datasets: tuple[str, ...] = ("spoken_digit", "mnist", "mnist-psnet")
    """spoken_digit, mnist, mnist-psnet, or digits (small, to try)."""
    hosts: tuple[int, ...] = (2, 4)
    mbit: tuple[float, ...] = (100, 1000, 10_000)
    """Rates at which every host's link sends, in Mbit/s; 0: as fast as the machine."""
    methods: tuple[str, ...] = ()
    """Only these; default: all of the data set."""
    cap: float | None = None
    """Seconds of training after which it is given up; default: 200, 40 or 60."""
    out: pathlib.Path | None = None
    """The CSV; the figure and the tables get its name. Default: network.csv in
    runs/results/benchmarks."""
    plot: bool = False
    """Measure nothing; needs no root."""
    data_dir: str | None = None
    """Where TFDS keeps its sets. Default: TFDS_DATA_DIR, else TFDS's own."""
    commit_results: bool = False
    """Write over results/network.csv and its figure, and the tables into NETWORK.md."""

    def __post_init__(self):
        for name, choices in (("datasets", CASES), ("methods", NAMES)):
            for wrong in set(getattr(self, name)) - set(choices):
                msg = f"--{name} {wrong}: write some of {', '.join(choices)}."
                raise ValueError(msg)
        if min(self.hosts, default=0) < 2 or min(self.mbit, default=-1) < 0:
            msg = f"--hosts {self.hosts} --mbit {self.mbit}: write 2 or more hosts, 0 or more Mbit."
            raise ValueError(msg)


def unavailable() -> str | None:
    """Why there are no slow links here, or None."""
    reason = namespaces.unavailable()
    if reason is None and shutil.which("tc") is None:
        reason = "limiting a link needs the command tc (iproute2)"
    return reason


def main(args: Args) -> None:
    """Measure what is not there yet, then draw.

    Raises:
      OSError: no namespaces here; trainings that did not end well.
    """
    reason = None if args.plot else unavailable()
    if reason:
        msg = f"{reason}; run it as root on Linux, or write --plot for the tables of what is there."
        raise OSError(msg)
    path = args.out or results_folder(RESULTS, args.commit_results) / "network.csv"
    failed = [] if args.plot else measure(args, path)
    rows = read_mixed(path)
    if rows:
        draw(rows, path.with_suffix(".png"))
        if path == CSV:
            paste(PAGE, "tables", tables(rows))
        else:
            replace(path.with_suffix(".md"), tables(rows))
    if failed:
        msg = f"did not end well, and may be measured by the same command: {', '.join(failed)}"
        raise OSError(msg)


# -------------------------------------------------------------------------------------- measurement


def measure(args: Args, path: pathlib.Path) -> list[str]:
    """Run what the CSV does not have; what did not end well."""
    groups = [
        (dataset, hosts, method)
        for dataset in args.datasets
        for hosts in args.hosts
        for method in CASES[dataset].methods
        if not args.methods or method in args.methods
    ]
    failed = []
    with tqdm(groups, unit="training") as bar:
        for group in bar:
            rows = read_mixed(path)
            done = {row["mbit"] for row in rows if key(row) == group}
            # the fastest first: it tells how many rounds there are to go
            rates = sorted(set(args.mbit) - done, key=lambda x: -(x or math.inf))
            bar.set_postfix_str(" ".join(map(str, group)))
            if rates:
                new, well = train(args, *group, rates)
                write_rows(path, rows + new)
                failed += [] if well else [" ".join(map(str, group))]
    return failed


def train(args: Args, dataset, hosts, method, rates) -> tuple[list[dict], bool]:
    """Rows of the CSV, and whether all processes ended well."""
    case = CASES[dataset]
    own = dict(case.methods[method])
    if own.pop("scaled", False):
        own["learning_rate"] = hosts * case.config["learning_rate"]
    size = case.batch_size * (hosts if case.of_a_host else 1)
    config = {**case.config, **own, "workers": hosts, "batch_size": size}
    at = () if method in case.never_trained else case.trained_at
    trained = [at is None or x in at for x in rates]
    name = f"n{os.getpid() % 100_000}"
    with tempfile.TemporaryDirectory() as folder, namespaces.Namespaces(hosts, name) as network:
        spec = {
            "config": config,
            "mbit": list(rates),
            "trained": trained,
            "interface": network.interface,
            "addresses": network.addresses,
            "targets": TARGETS,
            "report_steps": case.report_steps,
            "timed_steps": case.timed_steps,
            "cap": case.cap if args.cap is None else args.cap,
            "data_dir": args.data_dir,
        }
        path = pathlib.Path(folder, "spec.json")
        path.write_text(json.dumps(spec))
        lost = launch.run(
            hosts,
            ["-c", f"from {row_of.__module__} import main; main()", str(path)],
            grace=20,
            prefix=f"ip netns exec {name}-{{i}} {ALONE}",
            coordinator=f"{network.addresses[0]}:{PORT}",
        )
        found = []
        with contextlib.suppress(FileNotFoundError):
            texts = [pathlib.Path(folder, f"host{i}.json").read_text() for i in range(hosts)]
            found = [json.loads(text) for text in texts]
    by_rate = zip(*(x["cells"] for x in found))
    what = {"dataset": dataset, "method": method, **{k: config[k] for k in COPIED}}
    return [{**what, **row_of(TARGETS, found, cells)} for cells in by_rate], not lost


# ------------------------------------------------------------------------------------ what came out


def key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["dataset"], row["hosts"], row["method"]


def to_accuracy(rows: list[dict], row: dict, target: float) -> dict[str, Any] | None:
    """Seconds, thousands of samples and megabytes to an accuracy; None: not reached.

    Where steps were only timed, or the training was given up: as many rounds as the same training
    took at another rate, each as long as the mean of what was timed; `measured` is False.
    """
    at = f"{100 * target:.0f}"
    reached = [r for r in rows if key(r) == key(row) and r["trained"] and r[f"rounds_{at}"] != ""]
    measured = row in reached
    if not reached:
        return None
    rounds = (row if measured else reached[0])[f"rounds_{at}"]
    steps = rounds * row["local_steps"]
    megabytes = row["host_round_bytes"] * rounds * row["hosts"] / 1e6
    return {
        "measured": measured,
        "seconds": row[f"seconds_{at}"] if measured else steps * row["step_ms_mean"] / 1e3,
        "samples": steps * row["batch_size"] / 1e3,
        "megabytes": row[f"megabytes_{at}"] if measured else megabytes,
    }


def rate_name(mbit: float) -> str:
    if not mbit:
        return "no limit"
    return f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit:g} Mbit/s"


def approximate(x: float, measured: bool) -> str:
    return number(x) if measured else f"≈{number(x)}"


def number(x: float | None) -> str:
    """Three digits."""
    if x is None:
        return "not reached"
    return f"{x:.0f}" if x >= 100 else f"{x:.{max(2 - math.floor(math.log10(max(x, 0.01))), 0)}f}"


def tables(rows: list[dict[str, Any]]) -> str:
    """All tables, as Markdown."""
    rates = sorted({row["mbit"] for row in rows}, key=lambda x: x or math.inf)
    groups = list(
        dict.fromkeys(map(key, sorted(rows, key=lambda r: list(CASES).index(r["dataset"]))))
    )
    of = {(*key(row), row["mbit"]): row for row in rows}
    names = [rate_name(rate) for rate in rates]

    def table(title, columns, cell, chosen=groups):
        rows = []
        for group in chosen:
            data, hosts, method = group
            row = {"data": data, "hosts": hosts, "method": NAMES[method]}
            for name, x in zip(columns, cell(group)):
                row[name] = x if isinstance(x, str) else number(x)
            rows.append(row)
        return f"**{title}**\n\n{markdown(rows)}\n"

    def at_rates(value):
        return lambda g: [value(of[*g, r]) if (*g, r) in of else "" for r in rates]

    def sent(group):
        some = [of[*group, r] for r in rates if (*group, r) in of]
        ratio = lambda r: f"{r['host_round_bytes'] / r['ledger_host_round_bytes']:.3f}"
        first = str(some[0]["local_steps"]), some[0]["ledger_host_round_bytes"] / 1e6
        return [*first, *at_rates(ratio)(group)]

    def spread(r):
        return f"{number(r['step_ms'])} ({number(r['step_ms_low'])}–{number(r['step_ms_high'])})"

    bare = []
    for hosts in sorted({row["hosts"] for row in rows}):
        for rate in rates:
            own = [r for r in rows if (r["hosts"], r["mbit"]) == (hosts, rate)]
            low = min((r["raw_mbit_low"] for r in own), default=0)
            high = max((r["raw_mbit_high"] for r in own), default=0)
            if own:
                reached = f"{number(low)}–{number(high)}"
                bare.append({"hosts": hosts, "limit": rate_name(rate), "reached": reached})
    title = "**The bare links**, Mbit/s through one TCP connection a host, all at once"
    parts = [f"{title}\n\n{markdown(bare)}\n"]
    columns = ["steps a round", "ledger, MB a host and round", *names]
    parts += [table("Bytes: counted at the interface / the ledger's", columns, sent)]
    parts += [table("Milliseconds a gradient step, median (quartiles)", names, at_rates(spread))]
    trained = [g for g in groups if any(of.get((*g, r), {}).get("trained") for r in rates)]
    for target in TARGETS:
        found = {k: to_accuracy(rows, row, target) for k, row in of.items()}

        def amounts(group, found=found):
            some = [x for r in rates if (x := found.get((*group, r)))]
            at = [found.get((*group, r)) for r in rates]
            seconds = [approximate(x["seconds"], x["measured"]) if x else number(None) for x in at]
            best = sorted(some, key=lambda x: not x["measured"])[:1] or [{}]  # measured, if any is
            return [*seconds, *(best[0].get(x) for x in ("samples", "megabytes"))]

        def sooner(group, found=found):
            pairs = [
                (found.get((*group[:2], "data-parallel", r)), found.get((*group, r))) for r in rates
            ]
            return [
                approximate(a["seconds"] / b["seconds"], a["measured"] and b["measured"])
                if a and b
                else ""
                for a, b in pairs
            ]

        percent = f"{100 * target:.0f} %"
        columns = [*(f"seconds, {x}" for x in names), "thousands of samples", "MB, all hosts"]
        parts += [table(f"To {percent} test accuracy", columns, amounts, trained)]
        rest = [g for g in trained if g[2] != "data-parallel"]
        parts += [
            table(f"How many times sooner than data parallel: {percent}", names, sooner, rest)
        ]
    return "\n".join(parts)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Seconds to an accuracy, or of a step, against the links' rate; a panel each data and hosts.

    Hollow: the rounds are those of a training at another rate.
    """
    shown = {"spoken_digit": 0.90, "mnist": 0.90, "digits": 0.90}
    rates = sorted({row["mbit"] for row in rows}, key=lambda x: x or math.inf)
    panels = sorted(
        {(r["dataset"], r["hosts"]) for r in rows}, key=lambda x: (list(CASES).index(x[0]), x[1])
    )
    columns = min(len(panels), 2)
    figure = Figure(figsize=(10, 3.8 * -(-len(panels) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
    for ax, (dataset, hosts) in zip(axes, panels):
        target = shown.get(dataset)
        for method, colour in COLOURS.items():
            own = [r for r in rows if key(r) == (dataset, hosts, method)]
            points = []  # where, seconds, measured
            for row in sorted(own, key=lambda r: rates.index(r["mbit"])):
                at = to_accuracy(rows, row, target) if target else None
                at = at if target else {"seconds": row["step_ms"] / 1e3, "measured": True}
                if at:
                    points.append((rates.index(row["mbit"]), at["seconds"], at["measured"]))
            if points:
                xs, ys, _ = zip(*points)
                ax.plot(xs, ys, "o-", color=colour, label=NAMES[method], linewidth=1.6)
                rest = [(x, y) for x, y, measured in points if not measured]
                ax.plot(*zip(*rest), "o", color=colour, mfc="white") if rest else None
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks(range(len(rates)), [rate_name(rate) for rate in rates])
        what = f"to {100 * target:.0f} % test accuracy" if target else "one step"
        unit = "training time (s)" if target else "time of a step (s)"
        panel(ax, f"{dataset}, {hosts} hosts: {what}", "rate of every host's link", unit)
        ax.set_ylim(top=ax.get_ylim()[1] * (1 if target else 3))  # room for the legend
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
