"""Which worker evaluates which pairs of classes, on which samples: a `Plan` and its factories."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Integer

from psjax import data
from psjax._pairs import ordered_pairs, unordered_pairs
from psjax._select import selection_of
from psjax._selection import Selection
from psjax.plan._covers import difference_cover


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Tasks of every worker: which classes it holds, which pairs it computes, on which samples.

    Made by `elements`, `pairs`, `blocks` or `cyclic`. Arrays are NumPy's; W workers take T turns,
    each with a task of at most s classes, of which the first l are those of its samples.

    Attributes:
      kind: name of the factory.
      num_classes: C.
      classes: int32 `[W, T, s]`, ascending in each part; C, past the end, where there is none.
      pairs: bool `[W, T, l, s]`; whether the task has the pair of the label `classes[..., a]` and
        the other `classes[..., b]`.
      shares: int32 `[W, T, 2]`, `(i, r)`: of each label's slots the task takes i, i + r, i + 2r...
      base: the difference cover of a cyclic plan, in groups; else empty.
      num_groups: of a cyclic plan; else 0.
    """

    kind: str
    num_classes: int
    classes: np.ndarray
    pairs: np.ndarray
    shares: np.ndarray
    base: tuple[int, ...] = ()
    num_groups: int = 0

    def __str__(self):
        """Who holds and computes what."""
        return _describe(self)

    @property
    def num_workers(self) -> int:
        """W."""
        return self.classes.shape[0]

    @property
    def num_turns(self) -> int:
        """T: tasks a worker takes one after the other; more than 1 is the paper's switching."""
        return self.classes.shape[1]

    @property
    def block_size(self) -> int:
        """s: the most classes that a task holds."""
        return self.classes.shape[2]

    @property
    def labels(self) -> np.ndarray:
        """int32 `[W, T, l]`: the classes whose samples a task sees; C where it has none."""
        first = self.classes[:, :, : self.pairs.shape[2]]
        if self.pairs.shape[2] == 1:  # `by_label` fills runs up with tasks that have no pair
            return first
        return np.where(self.pairs.any(axis=3), first, self.num_classes).astype(np.int32)

    @property
    def num_tasks(self) -> int:
        """Tasks on disjoint samples counted once."""
        return int(np.sum(self.pairs.any(axis=(2, 3)) & (self.shares[..., 0] == 0)))

    def by_label(self) -> "Plan":
        """The same pairs on the same workers, each task divided into one task for each label.

        A worker's tasks of one label follow one another, filled up to equally many for every label
        with tasks that have no pair. They see the same samples, so that `psjax.value_and_grad` on
        `selection` evaluates what is shared, a network's trunk, once for each label and worker and
        not once for each label and task. The label comes first among a task's classes. For whole
        parameters; with the weights in shards, where a task's classes are fetched each turn,
        `merge_by_label` does it.

        Example:
          >>> import psjax
          >>> plan = psjax.plan.cyclic(7, 1, num_groups=7)
          >>> plan.pairs.shape, plan.by_label().pairs.shape
          ((1, 7, 3, 3), (1, 21, 1, 3))
        """
        W, T, _, s = self.pairs.shape
        C = self.num_classes
        w, t, a = np.nonzero(self.pairs.any(axis=3))
        label = self.classes[w, t, a]
        order = np.lexsort((t, label, w))
        w, t, a, label = w[order], t[order], a[order], label[order]
        starts, counts, of_worker, rank = _runs_of_labels(w, label, C)
        worker = w[starts]
        most, labels = int(counts.max()), int(of_worker.max()) + 1
        place = np.repeat(of_worker, counts) * most + rank

        turns = labels * most
        classes = np.full((W, turns, s), C, np.int32)
        pairs = np.zeros((W, turns, 1, s), bool)
        shares = np.ones((W, turns, 2), np.int32) * [0, 1]
        for copy in range(most):  # what fills a run up has its label
            classes[worker, of_worker * most + copy, 0] = label[starts]
            shares[worker, of_worker * most + copy] = self.shares[w[starts], t[starts]]
        rows = np.argsort(
            np.arange(s)[None] != a[:, None], axis=1, kind="stable"
        )  # the label first
        classes[w, place] = np.take_along_axis(self.classes[w, t], rows, axis=1)
        pairs[w, place, 0] = np.take_along_axis(self.pairs[w, t, a], rows, axis=1)
        shares[w, place] = self.shares[w, t]
        return dataclasses.replace(
            self, classes=classes, pairs=pairs, shares=shares.astype(np.int32)
        )

    def merge_by_label(self) -> "Plan":
        """The same pairs on the same workers, all of a worker's pairs of one label in one task.

        `psjax.plan.value_and_grad` then evaluates what is shared once for each label and worker,
        and fetches a class once for each of them. A task holds the label, first, and all its
        others: up to C classes, where one of `elements` holds two. `psjax.plan.table` says what
        that costs and saves. A plan of one turn is as it should be already.

        Example:
          >>> import psjax
          >>> plan = psjax.plan.elements(10, 5)
          >>> plan.pairs.shape, plan.merge_by_label().pairs.shape
          ((5, 18, 1, 2), (5, 2, 1, 10))
        """
        if self.num_turns == 1:
            return self
        W, C = self.num_workers, self.num_classes
        w, t, a, b = np.nonzero(self.pairs)
        label, other = self.classes[w, t, a], self.classes[w, t, b]
        order = np.lexsort((other, label, w))
        w, label, other = w[order], label[order], other[order]
        starts, counts, turn, rank = _runs_of_labels(w, label, C)
        place = 1 + rank
        classes = np.full((W, int(turn.max()) + 1, 1 + int(counts.max())), C, np.int32)
        pairs = np.zeros((*classes.shape[:2], 1, classes.shape[2]), bool)
        classes[w[starts], turn, 0] = label[starts]
        classes[w, np.repeat(turn, counts), place] = other
        pairs[w, np.repeat(turn, counts), 0, place] = True
        shares = np.broadcast_to(np.array([0, 1], np.int32), (*classes.shape[:2], 2))
        kind = f"{self.kind}, merged by label"
        return Plan(kind, C, classes, pairs, shares)

    def slots(self, slots: int) -> np.ndarray:
        """The slots of a label that each task takes: int32 `[W, T, S]`, `slots` where it has none.

        Args:
          slots: of one label in a batch, as in `psjax.data.batches_by_label`.

        Raises:
          ValueError: fewer than one slot.
        """
        if slots < 1:
            msg = f"Plan.slots({slots}): pass the number of slots of a batch by label, 1 or more."
            raise ValueError(msg)
        index, step = self.shares[..., :1], self.shares[..., 1:]
        most = -(-slots // int(self.shares[..., 1].min()))
        return np.minimum(index + step * np.arange(most), slots).astype(np.int32)

    def selection(
        self, axes: Any, like: Any, slots: int | None = None, axis: str = "class"
    ) -> Selection:
        """The plan's tasks as index sets, for `psjax.value_and_grad` on whole parameters.

        With `h(params, batch, pairs)` the element function and `in_axes=(P("label"), P("task"))`,
        or `(P("label", "slot"), P("task"))` where `slots` is given,
        `psjax.value_and_grad(h, in_axes)(params, selection, batch, pairs)` is the whole gradient;
        `batch` is by label, `[C, slots, ...]`, and `pairs` is `plan.pairs` as `[W * T, l, s]`.
        `split(W)` gives each worker its own tasks.

        Args:
          axes: as in `psjax.select`.
          like: the parameters, or `jax.ShapeDtypeStruct`s of them.
          slots: of one label in a batch; needed where tasks share the samples of a label.
          axis: name of the class axis.

        Raises:
          ValueError: no `slots` for a plan with more workers than tasks; as `psjax.select`.
        """
        num = self.num_classes
        if slots is None and self.shares[..., 1].max() > 1:
            msg = (
                f"Plan.selection(): {self.num_workers} workers share the samples of "
                f"{self.num_tasks} tasks; pass slots=..., those of one label in a batch."
            )
            raise ValueError(msg)
        rows = lambda x, end: np.ma.masked_equal(x.reshape(-1, x.shape[2]), end)
        index: dict[str, Any] = {axis: rows(self.classes, num), "label": rows(self.labels, num)}
        sizes = {"label": num, "task": len(index["label"])}
        index["task"] = np.arange(sizes["task"])
        if slots is not None:
            index["slot"], sizes["slot"] = rows(self.slots(slots), slots), slots
        return selection_of("Plan.selection", axes, index, like, sizes)

    def batches(
        self,
        labels: Any,
        batch_size: int,
        order: Any = None,
        slots: int | None = None,
        *,
        replicas: int = 1,
    ) -> data.Batches:
        """Index batches of every worker, who so reads only the samples of its own labels.

        Args:
          labels: `[N]`, of the whole set.
          batch_size: L, samples of all workers at a step.
          order: the epoch's samples in order, as in `psjax.data.batches_by_label`.
          slots: of one label in a batch; None: the most of this epoch. Give the most of all epochs
            (`psjax.data.most_of_a_label`), so that nothing recompiles.
          replicas: copies of all W workers with disjoint samples: the second axis of a mesh.

        Returns:
          `psjax.data.Batches`: `indices` int32 and `weights`
          `[steps, replicas * W, T, l, S]`, replica-major; `labels` `[steps, replicas * W, T, l]`.

        Raises:
          ValueError: fewer than one replica; labels outside `[0, C)`; as `batches_by_label`.
        """
        if replicas < 1:
            msg = f"Plan.batches(replicas={replicas}): pass 1 or more."
            raise ValueError(msg)
        rows = data.batches_by_label(labels, self.num_classes, batch_size, order, slots)
        index, step = self.shares[..., 0], self.shares[..., 1]
        copies = [
            dataclasses.replace(self, shares=np.stack([index + step * r, step * replicas], -1))
            for r in range(replicas)
        ]
        most = rows.indices.shape[2]
        taken = np.concatenate([copy.slots(most) for copy in copies])[:, :, None]
        own = np.concatenate([self.labels] * replicas)
        pad = lambda x, value: np.pad(x, [(0, 0), (0, 1), (0, 1)], constant_values=value)
        take = lambda x, value: pad(x, value)[:, own[..., None], taken]
        return data.Batches(
            take(rows.indices, len(labels)),
            take(rows.weights, 0),
            np.broadcast_to(own, (len(rows.indices), *own.shape)),
        )


# ------------------------------------------------------------------------------------------------


def elements(num_classes: int, num_workers: int) -> Plan:
    """A task is one element $h_{kj}$: the straightforward plan, the least memory.

    Args:
      num_classes: C; there are C (C - 1) tasks.
      num_workers: W.

    Raises:
      ValueError: fewer than two classes or than one worker.
    """
    check_classes("elements", num_classes, num_workers)
    tasks = ordered_pairs(num_classes)
    return _dealt("elements", num_workers, num_classes, tasks, np.array([[False, True]]))


def pairs(num_classes: int, num_workers: int) -> Plan:
    """A task is $h_{kj} + h_{jk}$, the only merging that holds no more weights.

    Args and errors as `elements`; there are C (C - 1) / 2 tasks.
    """
    check_classes("pairs", num_classes, num_workers)
    tasks = unordered_pairs(num_classes)
    return _dealt("pairs", num_workers, num_classes, tasks, ~np.eye(2, dtype=bool))


def blocks(num_classes: int, num_workers: int, block_size: int) -> Plan:
    """A task is all pairs between two groups of `block_size / 2` classes.

    The pairs within a group go to the first task that holds it. Any size and any number of
    workers; a cyclic plan has fewer tasks where it fits.

    Args:
      num_classes: C.
      num_workers: W.
      block_size: s, even, or at least C for a single task.

    Raises:
      ValueError: as `elements`; an odd size that is less than C.
    """
    check_classes("blocks", num_classes, num_workers)
    if block_size < 2 or (block_size % 2 and block_size < num_classes):
        msg = (
            f"blocks({num_classes}, {num_workers}, block_size={block_size}): a task holds two "
            "equal groups; pass an even number, 2 or more."
        )
        raise ValueError(msg)
    half = block_size // 2 if block_size < num_classes else num_classes
    group = np.arange(-(-num_classes // half))
    a, b = np.minimum(group[:, None], group), np.maximum(group[:, None], group)
    first = np.where(a < b, a, 0), np.where(a < b, b, np.maximum(b, 1))  # within a group: {0, g}
    sizes = np.minimum(half, num_classes - group * half)
    return _plan("blocks", num_workers, first[0] * num_classes + first[1], sizes)


def cyclic(num_classes: int, num_workers: int, num_groups: int | None = None) -> Plan:
    r"""Worker $w$ holds the groups $\{w + d \bmod G : d \in D\}$: cyclic quorums.

    The differences of $D$ cover $\mathbb Z_G$ (`difference_cover`), so that every two groups meet
    at some worker; $|D| \ge \sqrt G$ about. Where G divides C and W = G, all workers do the same
    work. A sample is evaluated by at most $|D|$ workers, not by C - 1. What a worker needs comes by
    $|D| - 1$ shifts.

    Args:
      num_classes: C.
      num_workers: W.
      num_groups: G, groups of equal size, give or take one class; None: the smaller of W and C.
        More groups than workers: less memory, several turns.

    Raises:
      ValueError: as `elements`; fewer than one group or more than classes.
    """
    check_classes("cyclic", num_classes, num_workers)
    num = min(num_workers, num_classes) if num_groups is None else num_groups
    if not 1 <= num <= num_classes:
        msg = (
            f"cyclic({num_classes}, {num_workers}, num_groups={num_groups}): pass a number of "
            f"groups from 1 to {num_classes}, the classes."
        )
        raise ValueError(msg)
    base = difference_cover(num)
    first = {0: 0}  # of two groups at a distance: w + first and w + first + distance meet at w
    for a, b in itertools.permutations(base, 2):
        if (b - a) % num not in first:
            first[(b - a) % num], first[(a - b) % num] = a, b
    group, sizes = np.arange(num), np.full(num, num_classes // num)
    sizes[: num_classes % num] += 1
    places = np.array([first[distance] for distance in range(num)])
    worker = (group[:, None] - places[(group - group[:, None]) % num]) % num
    plan = _plan("cyclic", num_workers, worker, sizes)
    return dataclasses.replace(plan, base=base, num_groups=num)


def _plan(kind: str, num_workers: int, task_of: np.ndarray, sizes: np.ndarray) -> Plan:
    """The tasks of pairs of groups, dealt to the workers.

    The classes stand in groups of `sizes`, in order. `task_of` is int `[G, G]`: which task has the
    pairs of a label of one group and another class of the other; the tasks in their order.
    """
    C, G, W = int(sizes.sum()), len(sizes), num_workers
    a, b = np.nonzero(~np.diag(sizes < 2))  # a class makes no pair with itself
    used = np.zeros(task_of.max() + 1, bool)
    used[task_of[a, b]] = True
    task = (np.cumsum(used) - 1)[task_of[a, b]]
    n, label, other = int(used.sum()), task * G + a, task * G + b

    # The groups that a task holds, as task * 2G + group, those without samples G further.
    labels = _distinct(label)
    others = _distinct(other)
    others = others[labels[np.minimum(np.searchsorted(labels, others), len(labels) - 1)] != others]
    far = lambda key: key + key // G * G
    held = np.sort(np.concatenate([far(labels), far(others) + G]))
    owner, group = held // (2 * G), held % G
    before = np.cumsum(sizes[group]) - sizes[group]
    place = before - before[np.searchsorted(owner, owner)]  # of the group's first class
    find = lambda key: place[np.searchsorted(held, key)]
    label_place = find(far(label))
    is_label = labels[np.minimum(np.searchsorted(labels, other), len(labels) - 1)] == other
    other_place = find(far(other) + np.where(is_label, 0, G))

    size = int((place + sizes[group]).max())
    rows = int((place + sizes[group])[held % (2 * G) < G].max())
    first = np.cumsum(sizes) - sizes
    classes = np.full((n, size), C, np.int32)
    (i,), at = _each(sizes[group])
    classes[owner[at], place[at] + i] = first[group[at]] + i
    mask = np.zeros((n, rows, size), bool)
    (i, j), at = _each(sizes[a], sizes[b])
    pair = (a[at] != b[at]) | (i != j)
    mask[task[at], label_place[at] + i, other_place[at] + j] = pair
    return _dealt(kind, W, C, classes, mask)


def _dealt(kind: str, num_workers: int, num_classes: int, classes: np.ndarray, mask: np.ndarray):
    """Tasks in turn if they are more than the workers, on disjoint samples if they are fewer.

    `classes` are those of every task, int `[n, s]`; `mask` its pairs, bool `[n, l, s]`, or `[l, s]`
    where all tasks have the same.
    """
    n, W = len(classes), num_workers
    parts = np.array_split(np.arange(max(n, W)) % n, W)
    own = np.full((W, len(parts[0])), n)
    for w, part in enumerate(parts):
        own[w, : len(part)] = part
    real = own < n
    own_classes = classes[np.minimum(own, n - 1)]
    own_classes[~real] = num_classes
    own_mask = mask[np.minimum(own, n - 1)] if mask.ndim == 3 else np.tile(mask, (*own.shape, 1, 1))
    own_mask[~real] = False
    times = np.maximum(-((own - W) // n), 1)  # workers t, t + n, t + 2n, ... share the task t
    share = np.stack([np.broadcast_to(np.arange(W)[:, None] // n, own.shape), times], axis=-1)
    return Plan(kind, num_classes, own_classes.astype(np.int32), own_mask, share.astype(np.int32))


def _runs_of_labels(worker: np.ndarray, label: np.ndarray, num_classes: int):
    """Runs of sorted entries: start, length, number among its worker's; and each one's place."""
    starts = np.flatnonzero(np.diff(worker * num_classes + label, prepend=-1))
    counts = np.diff(np.append(starts, len(worker)))
    of_worker = np.arange(len(starts)) - np.searchsorted(worker[starts], worker[starts])
    return starts, counts, of_worker, np.arange(len(worker)) - np.repeat(starts, counts)


def _distinct(keys: Integer[np.ndarray, " n"]):
    keys = np.sort(keys)
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])]


def _each(*sizes: Integer[np.ndarray, " n"]):
    """All indices of blocks of these sizes, and which block each belongs to."""
    total = np.prod(sizes, axis=0)
    at = np.repeat(np.arange(len(total)), total)
    rest = np.arange(len(at)) - np.repeat(np.cumsum(total) - total, total)
    found = []
    for size in reversed(sizes):
        found.append(rest % size[at])
        rest = rest // size[at]
    return tuple(reversed(found)), at


def _describe(plan: Plan):
    lines = [
        f"{plan.kind}: {plan.num_tasks} tasks of {plan.num_classes} classes on {plan.num_workers} "
        f"workers, {plan.num_turns} turn{'s' if plan.num_turns > 1 else ''}"
    ]
    for w, t in np.ndindex(plan.classes.shape[:2]):
        held = [int(c) for c in sorted(plan.classes[w, t]) if c < plan.num_classes]
        i, r = plan.shares[w, t]
        share = f", samples {i}, {i + r}, ... of each label" if r > 1 else ""
        turn = f" turn {t}" if plan.num_turns > 1 else ""
        lines.append(f"worker {w}{turn}: classes {held}, {plan.pairs[w, t].sum()} pairs{share}")
    return "\n".join(lines)


def check_classes(call: str, num_classes: int, num_workers: int):
    if num_classes < 2:
        msg = f"{call}(num_classes={num_classes}): one class has no pairs; pass 2 or more."
        raise ValueError(msg)
    if num_workers < 1:
        msg = f"{call}(num_workers={num_workers}): pass 1 worker or more."
        raise ValueError(msg)
