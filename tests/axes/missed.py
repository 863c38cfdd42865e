"""Fixed dimensions that can be permuted after all, found by trying.

A dimension is fixed where a rule knows nothing better. Whether its rows really are told apart is
seen in numbers: they are permuted in all leaves, inputs and results that have them, and the results
compared.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from psjax.axes._infer import UNUSED
from psjax.axes._rules import RULES
from psjax.axes._walk import Walk

_TOLERANCE = 1e-5  # of the largest result; rounding is below it in float32
_TRIES = 3  # permutations that must all be harmless


def missed(apply: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> list[str]:
    """Fixed rows whose permutation leaves the results as they were.

    Tried are: every fixed factor of a dimension; all of one reason and size together; all of one
    size together; each with and without the inputs, and in blocks and inside blocks of every
    divisor; and every dimension of a leaf without the other leaves. Left out are what the function
    never reads and what its results do not depend on, such as a bias that a normalisation takes
    away. Random numbers that the function draws are not permuted.

    Args:
      apply: `apply(params, *inputs)`.
      params: random parameters.
      inputs: the others.

    Returns:
      A description each: leaves, dimension, size, and how they were permuted.
    """
    program = jax.make_jaxpr(apply)(params, *inputs)
    walk = Walk(RULES)
    walked = walk.closed(program, [walk.value(aval) for aval in program.in_avals])
    flat = jax.tree_util.tree_leaves_with_path(params)
    trial = _Trial(apply, params, inputs, walk, walked, len(flat))
    paths = [jax.tree_util.keystr(path) for path, _ in flat]
    found = []
    done: set[int] = set()  # atoms that a simpler way was found for
    for atoms, leaves, how in _candidates(walk, walked, len(flat)):
        if done.issuperset(atoms):
            continue
        size = walk.atoms.size(atoms[0])
        for way, permutation in _ways(size):
            if trial.harmless(atoms, leaves, permutation):
                done |= set(atoms)
                if trial.ignored(atoms, leaves):
                    break
                own = [
                    f"{paths[i]} {d}"
                    for i, x in enumerate(walked.ins[: len(flat)])
                    for d, dim in enumerate(x.dims)
                    if i in leaves and not set(atoms).isdisjoint(walk.atoms.atoms(dim))
                ]
                more = f" and {len(own) - 3} more" if len(own) > 3 else ""
                found.append(f"{', '.join(own[:3])}{more} (size {size}{how}{way})")
                break
    return found


def _candidates(walk, walked, number) -> Iterator[tuple[list[int], set[int], str]]:
    """Atoms to permute, the arrays to permute them in, and words for what is unusual."""
    everywhere, params = set(range(len(walked.ins))), set(range(number))
    held: dict[int, set[int]] = {}
    for i, x in enumerate(walked.ins[:number]):
        for atom in (atom for dim in x.dims for atom in walk.atoms.atoms(dim)):
            reason = walk.atoms.fixed(atom)
            if reason is not None and reason.text != UNUSED.text and walk.atoms.size(atom) > 1:
                held.setdefault(atom, set()).add(i)
    by_reason: dict[Any, list[int]] = {}
    by_size: dict[int, list[int]] = {}
    for atom in held:
        reason, size = walk.atoms.fixed(atom), walk.atoms.size(atom)
        by_reason.setdefault((reason.text, id(reason.eqn), size), []).append(atom)
        by_size.setdefault(size, []).append(atom)
    for atoms in itertools.chain(([a] for a in held), by_reason.values(), by_size.values()):
        yield atoms, everywhere, ""
        yield atoms, params, ", inputs as they are"
    for atom, leaves in held.items():
        if len(leaves) > 1:
            for i in sorted(leaves):
                yield [atom], {i}, ", this leaf alone"


def _ways(size) -> Iterator[tuple[str, Callable[[np.random.Generator], np.ndarray]]]:
    """Random permutations of the rows, and of blocks of them or inside blocks."""
    yield "", lambda rng: _moved(rng, size)
    for n in range(2, size):
        if size % n == 0:
            grid = np.arange(size).reshape(n, -1)
            yield f", {n} blocks", lambda rng, n=n, grid=grid: grid[_moved(rng, n)].reshape(-1)
            inner = size // n
            yield (
                f", inside {n} blocks",
                lambda rng, k=inner, grid=grid: grid[:, _moved(rng, k)].reshape(-1),
            )


def _moved(rng, size):
    """A random permutation, but not the identity."""
    while True:
        order = rng.permutation(size)
        if np.any(order != np.arange(size)):
            return order


class _Trial:
    """Permutes rows of a function's arrays and compares its results."""

    def __init__(self, apply, params, inputs, walk, walked, number):
        self.walk, self.walked, self.number = walk, walked, number
        tree = jax.tree.structure((params, *inputs))
        self.run = jax.jit(lambda arrays: jax.tree.leaves(apply(*tree.unflatten(arrays))))
        self.arrays = jax.tree.leaves((params, *inputs))
        self.base = [np.asarray(y) for y in self.run(self.arrays)]

    def harmless(self, atoms, leaves, permutation):
        rng = np.random.default_rng(0)
        for _ in range(_TRIES):
            order = permutation(rng)
            perms = dict.fromkeys(atoms, order)
            moved = [
                self._permuted(x, value, perms) if i in leaves else x
                for i, (x, value) in enumerate(zip(self.arrays, self.walked.ins))
            ]
            same = leaves == set(range(len(self.arrays)))
            wanted = [
                self._permuted(y, value, perms) if same else y
                for y, value in zip(self.base, self.walked.outs)
            ]
            if not all(_equal(np.asarray(y), z) for y, z in zip(self.run(moved), wanted)):
                return False
        return True

    def ignored(self, atoms, leaves):
        """Whether the results stay where the rows are multiplied by random factors."""
        rng = np.random.default_rng(0)
        arrays = list(self.arrays)
        for i in (i for i in leaves if i < self.number):
            for d, dim in enumerate(self.walked.ins[i].dims):
                if not set(atoms).isdisjoint(self.walk.atoms.atoms(dim)):
                    shape = [n if e == d else 1 for e, n in enumerate(arrays[i].shape)]
                    factors = rng.uniform(0.5, 1.5, shape)
                    arrays[i] = (arrays[i] * factors).astype(arrays[i].dtype)
        return all(_equal(np.asarray(y), z) for y, z in zip(self.run(arrays), self.base))

    def _permuted(self, x, value, perms):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        for d, dim in enumerate(value.dims):
            if not perms.keys().isdisjoint(self.walk.atoms.atoms(dim)):
                x = x.take(self._rows(dim, perms), axis=d)
        if value.points is not None:
            x = np.argsort(self._rows(value.points, perms))[x].astype(x.dtype)
        return x

    def _rows(self, dim, perms):
        """Where every row of a dimension comes from."""
        found, start, atoms = [], 0, self.walk.atoms
        for term in atoms.expand(dim):
            own = np.zeros(1, int)
            for atom in term:
                n, parts = atoms.size(atom), atoms.parts(atom)
                inner = perms.get(atom, np.arange(n)) if parts is None else self._rows(parts, perms)
                own = (own[:, None] * n + inner[None]).reshape(-1)
            found.append(start + own)
            start += len(own)
        return np.concatenate(found) if found else np.zeros(0, int)


def _equal(found, want):
    if found.dtype.kind not in "fc":
        return bool(np.all(found == want))
    size = float(np.max(np.abs(want), initial=0.0))
    return bool(np.max(np.abs(found - want), initial=0.0) <= _TOLERANCE * size)
