"""The search that made the table of difference covers in `psjax/plan/_covers.py`.

    python -m experiments.covers --last 79
    python -m experiments.covers
    python -m experiments.covers --start-from-table

For every modulus W a line of the table is printed as soon as it is done, with the size and the
lower bound: the smallest k with k (k - 1) >= W - 1, because every residue but 0 is the difference
of a pair. The last line names the moduli whose covers are not proved to be the smallest.

The search itself is `experiments/cover_search.py`. A size that it gives up on, after `--max-sets`,
leaves the entry unproved.
"""

import dataclasses
import itertools
import sys

import numpy as np
from tqdm import tqdm

from experiments._lib.command import run_script
from experiments.cover_search import LARGEST, anneal, exhaust, is_cover, lower_bound
from psjax.plan import difference_cover


@dataclasses.dataclass
class Args:
    """Search difference covers, the smallest that can be found, and prove what can be proved."""

    first: int = 1
    """The first modulus."""
    last: int = LARGEST
    """The last modulus; at most 128."""
    start_from_table: bool = False
    """Check the table's covers and search only for smaller ones."""
    steps: int = 20_000
    """Steps of annealing for each size."""
    max_sets: float = 1e9
    """Give up a proof after so many sets; 1e9 take about two minutes."""
    seed: int = 0
    """Of the annealing, together with the modulus."""


def search(modulus: int, args: Args) -> tuple[tuple[int, ...], bool]:
    """The smallest cover found, and whether there is none smaller."""
    rng = np.random.default_rng((args.seed, modulus))
    known = None
    if args.start_from_table:
        known = difference_cover(modulus)
        if not is_cover(known, modulus):
            msg = f"the table's entry for {modulus} is no difference cover: {known}."
            raise ValueError(msg)
    proved = True
    for size in itertools.count(lower_bound(modulus)):
        if known is not None and size == len(known):
            return known, proved
        cover = anneal(modulus, size, rng, args.steps)
        if cover is None:
            name = f"all sets of {size}"
            with tqdm(
                total=args.max_sets, unit="set", unit_scale=True, desc=name, leave=False
            ) as sets:
                cover, finished = exhaust(modulus, size, args.max_sets, sets.update)
            proved = proved and (finished or cover is not None)
        if cover is not None:
            return cover, proved
    raise AssertionError


def main(args: Args) -> None:
    if not 1 <= args.first <= args.last <= LARGEST:
        msg = f"--first {args.first} --last {args.last}: write 1 <= first <= last <= {LARGEST}."
        raise ValueError(msg)
    unproved = []
    with tqdm(total=args.last - args.first + 1, unit="modulus") as bar:
        for modulus in range(args.first, args.last + 1):
            bar.set_description(f"W = {modulus}")
            cover, proved = search(modulus, args)
            if not proved:
                unproved.append(modulus)
            sizes = f"{len(cover)}, bound {lower_bound(modulus)}"
            note = "" if proved else ", not proved"
            bar.write(f"    {cover},  # {modulus}: {sizes}{note}", file=sys.stdout)
            sys.stdout.flush()
            bar.update()
    print(f"_UNPROVED = {tuple(unproved)}")


if __name__ == "__main__":
    run_script(main, Args, __doc__, "write --first, the modulus whose line is missing.")
