"""The plan with the shortest predicted step."""

import dataclasses
import math
from typing import Any

from flax import linen as nn

from psjax.plan._cost import Table, check_numbers, slots_of, table, workload
from psjax.plan._plan import blocks, check_classes, cyclic, elements, pairs


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
) -> Table:
    """The plan with the shortest predicted step that fits into the memory.

    Considered are single elements, merged pairs, blocks of every even size, a single task of all
    classes, and cyclic plans of every number of groups; of more than 64 classes only the powers of
    two and the divisors of C and W, as numbers of groups and as sizes of half a block.

    Args:
      model: as in `workload`.
      num_classes: C.
      num_workers: W.
      inputs: as in `workload`.
      batch_size: samples of all workers at a step.
      bandwidth: bytes a second of one worker.
      flops: operations a second of one worker.
      memory: bytes of one worker for weights, gradients and moments; None: no limit.
      slots: as in `table`.
      moments: as in `table`.
      local_steps: as in `table`.

    Returns:
      A `Table` of the chosen plan and of what it was compared with, one row for each kind; its
      `best` is the chosen `Plan`. Print it: a method that is no plan may be faster.

    Raises:
      ValueError: no plan fits, with the least memory that one needs; as `table` and `workload`;
        fewer than two classes.
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
    slots = slots_of("best", slots, batch_size, num_classes)
    work = workload(model, num_classes, inputs)
    plans = candidates(num_classes, num_workers)
    costs = table(work, plans, memory=memory, slots=slots, **numbers)
    rows = [row for row in costs.rows if row.plan is not None]
    if costs.best is None:
        small = min(rows, key=lambda row: row.memory)
        msg = (
            f"best(memory={memory}): no plan for {num_classes} classes on {num_workers} workers "
            f"fits; the least is {math.ceil(small.memory)} bytes a worker, of {small.name}."
        )
        raise ValueError(msg)
    fit = [row for row in rows if memory is None or row.memory <= memory]
    chosen = next(row for row in fit if row.plan is costs.best)
    kinds = {row.plan.kind: row for row in sorted(fit, key=lambda r: -r.seconds)}
    shown = [row for row in kinds.values() if row is not chosen]
    others = [row for row in costs.rows if row.plan is None]
    first = chosen._replace(name=f"{chosen.name} (chosen)")
    return dataclasses.replace(costs, rows=(first, *shown, *others))


def candidates(C, W):
    few = range(2, C)
    if C > 64:
        few = [n for n in few if C % n == 0 or W % n == 0 or n & (n - 1) == 0]
    yield elements(C, W)
    yield pairs(C, W)
    yield from (blocks(C, W, s) for s in [*(2 * n for n in few if 2 * n < C), C])
    yield from (cyclic(C, W, groups) for groups in [*few, C])
