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
    """Which classes each worker holds, which pairs it computes, and on which samples.

    `elements`, `pairs`, `blocks` and `cyclic` make plans. W workers take T turns, each with a task
    of s classes at most. The first l of them are the labels of its samples. Arrays are NumPy's.

    Attributes:
      kind: name of the factory.
      num_classes: number of classes, C.
      classes: int32 `[W, T, s]`, ascending in each part, padded with C.
      pairs: bool `[W, T, l, s]`; whether the task has the pair with label `classes[..., a]` and
        other class `classes[..., b]`.
      shares: int32 `[W, T, 2]`, `(i, r)`: the task takes slots i, i + r, i + 2r... of each label.
      base: the difference cover of a cyclic plan, in groups; else empty.
      num_groups: number of groups of a cyclic plan; else 0.
    """

    kind: str
    num_classes: int
    classes: np.ndarray
    pairs: np.ndarray
    shares: np.ndarray
    base: tuple[int, ...] = ()
    num_groups: int = 0

    def __str__(self):
        """What each worker holds and computes."""
        return _describe(self)

    @property
    def num_workers(self) -> int:
        """Number of workers, W."""
        return self.classes.shape[0]

    @property
    def num_turns(self) -> int:
        """Tasks per worker, one after the other, T. More than 1 is the paper's *switching*."""
        return self.classes.shape[1]

    @property
    def block_size(self) -> int:
        """The largest number of classes in a task, s."""
        return self.classes.shape[2]

    @property
    def labels(self) -> np.ndarray:
        """Labels of the samples that a task sees: int32 `[W, T, l]`, padded with C."""
        first = self.classes[:, :, : self.pairs.shape[2]]
        if self.pairs.shape[2] == 1:  # `by_label` pads runs with tasks that have no pair
            return first
        return np.where(self.pairs.any(axis=3), first, self.num_classes).astype(np.int32)

    @property
    def num_tasks(self) -> int:
        """Number of tasks; the same task on disjoint samples counts once."""
        return int(np.sum(self.pairs.any(axis=(2, 3)) & (self.shares[..., 0] == 0)))

    def by_label(self) -> "Plan":
        """Divide each task into one task per label. Every worker keeps its pairs.

        A worker's tasks of one label follow one another and see the same samples. Therefore
        `psjax.value_and_grad` on `selection` evaluates the trunk, the layers that all scores share,
        once per label and worker instead of once per label and task. Every label gets equally many
        tasks; some are padding without a pair. The label is the first class of its task. This is
        for whole parameters; with weights in shards, use `merge_by_label`.

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
        for copy in range(most):  # padding of a run has its label
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
        """Merge all of a worker's pairs of one label into one task.

        `psjax.plan.value_and_grad` then evaluates shared layers, and fetches a class, once per
        label and worker. A task holds its label first and then all other classes of its pairs: up
        to C classes, where a task of `elements` holds two. `psjax.plan.table` says what this costs
        and saves. A plan of one turn gains nothing.

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
        """The slots of a label that each task takes: int32 `[W, T, S]`, padded with `slots`.

        Args:
          slots: places per label in a batch, as in `psjax.data.batches_by_label`.

        Raises:
          ValueError: `slots` is less than 1.
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
          slots: places per label in a batch; needed if tasks share the samples of a label.
          axis: name of the class axis.

        Raises:
          ValueError: the plan has more workers than tasks, and `slots` is None; as `psjax.select`.
        """
        num = self.num_classes
        if slots is None and self.shares[..., 1].max() > 1:
            msg = (
                f"Plan.selection(): {self.num_workers} workers share the samples of "
                f"{self.num_tasks} tasks; pass slots=..., the places per label in a batch."
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
        """Index batches per worker, so that it reads only the samples of its own labels.

        Args:
          labels: `[N]`, the labels of the whole set.
          batch_size: samples of all workers in a step, L.
          order: the samples of the epoch in order, as in `psjax.data.batches_by_label`.
          slots: places per label in a batch; None: the most of this epoch. Pass the most of all
            epochs (`psjax.data.most_of_a_label`), so that nothing recompiles.
          replicas: copies of all W workers with disjoint samples: the second axis of a mesh.

        Returns:
          `psjax.data.Batches`: `indices` int32 and `weights`
          `[steps, replicas * W, T, l, S]`, replica-major; `labels` `[steps, replicas * W, T, l]`.

        Raises:
          ValueError: `replicas` is less than 1, labels are not in `[0, C)`; as `batches_by_label`.
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
    """A plan with one element $h_{kj}$ per task. It needs the least memory.

    Args:
      num_classes: number of classes, C; there are C (C - 1) tasks.
      num_workers: number of workers, W.

    Raises:
      ValueError: there are fewer than two classes, or there is no worker.
    """
    check_classes("elements", num_classes, num_workers)
    tasks = ordered_pairs(num_classes)
    return _dealt("elements", num_workers, num_classes, tasks, np.array([[False, True]]))


def pairs(num_classes: int, num_workers: int) -> Plan:
    """A plan with $h_{kj} + h_{jk}$ per task: the only merging that needs no more weights.

    Arguments and errors are those of `elements`; there are C (C - 1) / 2 tasks.
    """
    check_classes("pairs", num_classes, num_workers)
    tasks = unordered_pairs(num_classes)
    return _dealt("pairs", num_workers, num_classes, tasks, ~np.eye(2, dtype=bool))


def blocks(num_classes: int, num_workers: int, block_size: int) -> Plan:
    """A plan with all pairs between two groups of `block_size / 2` classes per task.

    The pairs within a group belong to the first task that has the group. Any size and number of
    workers will do; a cyclic plan has fewer tasks where it fits.

    Args:
      num_classes: number of classes, C.
      num_workers: number of workers, W.
      block_size: classes per task, s; even, or C or more for a single task.

    Raises:
      ValueError: as `elements`; `block_size` is odd and less than C.
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
    r"""A plan of cyclic quorums: worker $w$ holds the groups $\{w + d \bmod G : d \in D\}$.

    The differences of $D$ cover $\mathbb Z_G$ (`difference_cover`), so that every two groups meet
    at some worker; $|D|$ is about $\sqrt G$ or more. If G divides C and W = G, all workers do the
    same work. At most $|D|$ workers evaluate a sample, compared with C - 1 for `elements`. A worker
    receives its classes in $|D| - 1$ shifts.

    Args:
      num_classes: number of classes, C.
      num_workers: number of workers, W.
      num_groups: number of groups, G, whose sizes differ by one class at most; None: the smaller of
        W and C. With more groups than workers there are several turns and less memory.

    Raises:
      ValueError: as `elements`; `num_groups` is less than 1 or more than C.
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
    first = {0: 0}  # per distance: groups w + first and w + first + distance meet at worker w
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
    """Deal the pairs of groups to the workers as tasks.

    `sizes` are those of the groups, which take the classes in order. `task_of` is int `[G, G]`: the
    task with the pairs of a label in the first group and another class in the second.
    """
    C, G, W = int(sizes.sum()), len(sizes), num_workers
    a, b = np.nonzero(~np.diag(sizes < 2))  # a class makes no pair with itself
    used = np.zeros(task_of.max() + 1, bool)
    used[task_of[a, b]] = True
    task = (np.cumsum(used) - 1)[task_of[a, b]]
    n, label, other = int(used.sum()), task * G + a, task * G + b

    # The groups of a task as task * 2G + group; plus G for groups without samples.
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
    """Deal tasks in turns if they outnumber the workers, else on disjoint samples.

    `classes` are the classes of every task, int `[n, s]`. `mask` has their pairs, bool
    `[n, l, s]`, or `[l, s]` if all tasks have the same.
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
    """Runs of sorted entries: start, length, number within the worker; and places of entries."""
    starts = np.flatnonzero(np.diff(worker * num_classes + label, prepend=-1))
    counts = np.diff(np.append(starts, len(worker)))
    of_worker = np.arange(len(starts)) - np.searchsorted(worker[starts], worker[starts])
    return starts, counts, of_worker, np.arange(len(worker)) - np.repeat(starts, counts)


def _distinct(keys: Integer[np.ndarray, " n"]):
    keys = np.sort(keys)
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])]


def _each(*sizes: Integer[np.ndarray, " n"]):
    """All indices within blocks of these sizes, and the block of each index."""
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
