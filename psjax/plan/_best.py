"""The plan with the shortest predicted step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import linen as nn

from psjax.plan._cost import (
    Prediction,
    Table,
    check_numbers,
    least_of,
    plan_row,
    seconds_of,
    slots_of,
    table,
    workload,
)
from psjax.plan._covers import difference_cover
from psjax.plan._plan import Plan, blocks, check_classes, cyclic, elements, pairs
from psjax.plan._store import Store


def best(
    model: nn.Module,
    num_classes: int,
    num_workers: int,
    *,
    inputs: Any,
    batch_size: int,
    bandwidth: float,
    flops: float,
    memory: float | None = None,
    slots: int | None = None,
    moments: int = 2,
    local_steps: int = 10,
    codec: Any = None,
) -> Table:
    """The plan with the shortest predicted step that fits into the memory.

    It considers single elements, all elements of a label as one task, merged pairs, blocks of every
    even size, a single task of all classes, and cyclic plans with every number of groups. For more
    than 64 classes, numbers of groups and half block sizes are limited to powers of two and
    divisors of C and W.

    Args:
      model: as in `workload`.
      num_classes: number of classes, C.
      num_workers: number of workers, W.
      inputs: as in `workload`.
      batch_size: samples of all workers per step.
      bandwidth: bytes per second of one worker.
      flops: operations per second of one worker.
      memory: bytes per worker for weights, gradients and moments; None: no limit.
      slots: as in `table`.
      moments: as in `table`.
      local_steps: as in `table`.
      codec: as in `table`. The rows that it adds are no plans, and are not chosen; that they may
        be faster is what the table then shows.

    Returns:
      A `Table` with the chosen plan and one row per other kind. Its attribute `best` is the chosen
      `Plan`. Print the table, because a method that is not a plan may be faster.

    Raises:
      ValueError: no plan fits (the message says how much memory the smallest needs), or there are
        fewer than two classes; as `table` and `workload`.
    """
    check_classes("best", num_classes, num_workers)
    numbers: Any = {
        "num_workers": num_workers,
        "batch_size": batch_size,
        "bandwidth": bandwidth,
        "flops": flops,
        "moments": moments,
        "local_steps": local_steps,
    }
    check_numbers("best", **numbers)
    each = slots_of("best", slots, batch_size, num_classes)
    work = workload(model, num_classes, inputs)
    store = Store(work.axes, work.like, num_workers)

    def row_of(plan: Plan):
        row = plan_row(work, plan, store, batch_size, each, moments)
        return row._replace(seconds=seconds_of(row, flops, bandwidth))

    def least(size: int):  # a little less, to allow for rounding
        computed, received = least_of(work, num_classes, num_workers, each, size)
        return 0.999999 * (computed / flops + 2 * received / bandwidth)

    kinds = candidates(num_classes, num_workers)
    plans = [_fastest(kind, row_of, least, memory) for kind in kinds.values()]
    costs = table(work, plans, memory=memory, slots=each, codec=codec, **numbers)
    rows = [row for row in costs.rows if row.plan is not None]
    if costs.best is None:
        small = min(rows, key=lambda row: row.memory)
        msg = (
            f"best(memory={memory}): no plan for {num_classes} classes on {num_workers} workers "
            f"fits; the least is {math.ceil(small.memory)} bytes per worker, for {small.name}."
        )
        raise ValueError(msg)
    chosen = next(row for row in rows if row.plan is costs.best)
    fit = [row for row in rows if memory is None or row.memory <= memory]
    shown = [row for row in fit if row is not chosen]
    others = [row for row in costs.rows if row.plan is None]
    first = chosen._replace(name=f"{chosen.name} (chosen)")
    return dataclasses.replace(costs, rows=(first, *shown, *others))


def _fastest(
    kind: Sequence["Candidate"],
    row_of: Callable[[Plan], Prediction],
    least: Callable[[int], float],
    memory: float | None,
):
    """The fastest plan of a kind that fits into the memory; if none does, the smallest.

    Plans are made in the order of the least time that their tasks can take, until no other can be
    faster than the best one.
    """
    if len(kind) == 1:
        return kind[0].make()
    times = [least(candidate.size) for candidate in kind]
    best, best_plan = None, None
    for i in sorted(range(len(kind)), key=lambda i: times[i]):
        if best is not None and best[:2] < (False, times[i]):
            break
        plan = kind[i].make()
        row = row_of(plan)
        large = memory is not None and row.memory > memory
        key = (large, row.memory if large else row.seconds, row.memory, i)
        if best is None or key < best:
            best, best_plan = key, plan
    return best_plan


class Candidate(NamedTuple):
    """A plan that has not been made yet.

    Attributes:
      make: returns the plan.
      size: the most classes that its tasks may hold.
    """

    make: Callable[[], Plan]
    size: int


def candidates(C: int, W: int) -> dict[str, list[Candidate]]:
    """The plans that `best` considers, by kind."""
    few = range(2, C)
    if C > 64:
        few = [n for n in few if C % n == 0 or W % n == 0 or n & (n - 1) == 0]
    later = functools.partial
    most = lambda groups: min(C, len(difference_cover(groups)) * -(-C // groups))
    sizes = [*(2 * n for n in few if 2 * n < C), C]
    return {
        "elements": [Candidate(later(elements, C, W), 2)],
        "labels": [Candidate(lambda: elements(C, W).merge_by_label(), C)],
        "pairs": [Candidate(later(pairs, C, W), 2)],
        "blocks": [Candidate(later(blocks, C, W, size), size) for size in sizes],
        "cyclic": [Candidate(later(cyclic, C, W, n), most(n)) for n in [*few, C]],
    }
