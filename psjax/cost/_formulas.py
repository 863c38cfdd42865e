"""Traffic and work of plain dense networks, by formulas."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """The cost of one gradient step, averaged over a round, of all workers together.

    Divide by n for one worker; multiply by `local_steps` for one round.

    Attributes:
      floats: numbers sent.
      flops: floating point operations of the matrix products, two per multiplication.
      samples: samples seen. Divide by it to compare methods that see different numbers of samples.
    """

    floats: float
    flops: float
    samples: int


# ------------------------------------------------------------------------------ without coordinator


def data_parallel(
    widths: Sequence[int], batch_size: int, num_workers: int, *, vectors: int = 0
) -> Cost:
    r"""Data-parallel SGD with a ring all-reduce of the gradients.

    With $W = \sum_{i=1}^t N_{i-1} N_i$ plus `vectors`, the ring sends $2 (n-1) W$ floats, which is
    $2 W (n-1)/n$ per worker. A sample takes 6 operations per weight: 2 each for the output, the
    gradient of the weight and the gradient of the input. The first layer takes 4, because its input
    needs no gradient.

    Args:
      widths: `(N_0, ..., N_t)`.
      batch_size: samples of *one worker* per gradient step.
      num_workers: number of workers, n.
      vectors: floats besides the matrices, such as biases; their work is not counted.

    Raises:
      ValueError: there are fewer than two widths, or a number is not positive.
    """
    matrices = _matrices("data_parallel", 2, widths, batch_size, num_workers)
    return _replicas(matrices, batch_size, num_workers, vectors)


def local_sgd(
    widths: Sequence[int],
    batch_size: int,
    num_workers: int,
    local_steps: int,
    *,
    moments: int = 0,
    vectors: int = 0,
) -> Cost:
    """Local SGD: a ring all-reduce averages the weights every `local_steps` gradient steps.

    Args:
      widths: as in `data_parallel`.
      batch_size: samples of one worker per gradient step.
      num_workers: number of workers, n.
      local_steps: gradient steps per round, J.
      moments: optimizer moments per weight, averaged with the weights: 0, 1 (momentum), 2 (Adam).
      vectors: as in `data_parallel`.

    Raises:
      ValueError: as `data_parallel`.
    """
    matrices = _matrices("local_sgd", 2, widths, batch_size, num_workers, local_steps)
    floats, flops, samples = _replicas(matrices, batch_size, num_workers, vectors)
    return Cost((1 + moments) * floats / local_steps, flops, samples)


def independent_subnets(
    widths: Sequence[int],
    batch_size: int,
    num_workers: int,
    local_steps: int,
    *,
    moments: int = 0,
    split_vectors: int = 0,
    shared: int = 0,
) -> Cost:
    r"""Independent subnet training between workers that own the weights in shards.

    Every hidden layer is split: a subnet has a share $1/n$ of its neurons. Each leaf is sharded
    over the n workers along one split axis. At the beginning of a round, one all-to-all per leaf
    sends every worker the parts of its subnet, and at the end another returns them. The share $1/n$
    that a worker owns itself is not sent. A round of $J$ steps sends

    $$2 (1 - 1/n) (1 + m) \Big[N_0 N_1 + N_{t-1} N_t + \frac1n \sum_{i=2}^{t-1} N_{i-1} N_i + V\Big]
    + 2 (n - 1) (1 + m) S$$

    floats, with $m$ `moments`, $V$ `split_vectors` and $S$ `shared`. This is exact for a stratified
    draw, where each owner splits its $N_i/n$ neurons into n equal groups, so that $n^2$ must divide
    the hidden widths. For other draws it is the mean, without padding. Index sets follow from a
    common seed and are not sent.

    The work is that of `data_parallel` on the subnets: $1/n^2$ of each matrix between hidden layers
    and $1/n$ of the first and last. A step sees `n * batch_size` samples, each in one subnet.

    Args:
      widths: `(N_0, ..., N_t)`, with one hidden layer or more.
      batch_size: samples of one worker per gradient step.
      num_workers: number of workers and of subnets, n.
      local_steps: gradient steps per round, J.
      moments: optimizer moments per weight, sent with the weights: 0, 1 (momentum), 2 (Adam).
      split_vectors: floats of vectors along split axes: `sum(widths[1:-1])` for the biases of the
        hidden layers, three times as many with the scales and shifts of a normalisation.
      shared: floats of the leaves that every worker has, such as the bias of the output, `N_t`.
        They and their moments are averaged by a ring all-reduce.

    Raises:
      ValueError: there are fewer than three widths, or a number is not positive.
    """
    call, n = "independent_subnets", num_workers
    first, *hidden, last = _matrices(call, 3, widths, batch_size, n, local_steps)
    ends = first + last + split_vectors
    exchange = n * ends + sum(hidden) + n**2 * shared  # times n^2, so that integers stay integers
    floats = 2 * (n - 1) * (1 + moments) * exchange / (n**2 * local_steps)
    flops = batch_size * (4 * first + 6 * last + 6 * sum(hidden) / n)
    return Cost(floats, float(flops), n * batch_size)


def encoded_mean(num_floats: int, num_workers: int, codec: Any, dtype: Any = "float32") -> int:
    r"""Bytes that `psjax.codec.mean` sends, all workers together.

    Each of n workers sends $n-1$ encoded shards to their owners, and its own encoded mean to
    $n-1$ others: $2 n (n-1) B$ with B the codec's bytes of a shard, padded to whole blocks. The
    identity is a ring all-reduce, $2 (n-1)$ times the bytes. The difference of the weights after
    `local_steps` steps, by `psjax.codec.compress`, is one such mean.

    Args:
      num_floats: entries of all leaves.
      num_workers: n.
      codec: a `psjax.codec.Codec`.
      dtype: of the entries.

    Raises:
      ValueError: a number that is not positive.

    Example:
      >>> import psjax
      >>> mean = lambda codec: psjax.cost.encoded_mean(1_000_000, 8, codec)
      >>> round(mean(psjax.codec.identity()) / mean(psjax.codec.int4(64)), 2)
      7.11
    """
    for name, value in [("num_floats", num_floats), ("num_workers", num_workers)]:
        if value < 1:
            msg = f"encoded_mean({name}={value}): write 1 or more."
            raise ValueError(msg)
    n = num_workers
    if codec.exact:
        return 2 * (n - 1) * codec.bytes((num_floats,), dtype)
    shard = codec.block * math.ceil(math.ceil(num_floats / n) / codec.block)
    return 2 * n * (n - 1) * codec.bytes((shard,), dtype)


# ------------------------------------------------------------------------------------ as they stand


def printed_data_parallel(widths: Sequence[int], batch_size: int, num_workers: int) -> Cost:
    r"""Data parallel as section 4.2 prints it: $\sum n N_{i-1} N_i$ floats, $4 B \sum N_{i-1} N_i$.

    Warning: this formula counts only the floats that a coordinator broadcasts, not the gradients
    that return. The $B$ samples are divided over the workers. The work has two of the three
    products of a layer (output, gradient of the weight, gradient of the input). `data_parallel`
    counts all of it.

    Args:
      widths: `(N_0, ..., N_t)`.
      batch_size: samples of *all workers* per gradient step.
      num_workers: number of workers, n.

    Raises:
      ValueError: as `data_parallel`.
    """
    matrices = _matrices("printed_data_parallel", 2, widths, batch_size, num_workers)
    weights = sum(matrices)
    floats, flops = num_workers * weights, 4 * batch_size * weights
    return Cost(float(floats), float(flops), batch_size)


def printed_independent_subnets(
    widths: Sequence[int],
    batch_size: int,
    num_workers: int,
    local_steps: int,
    *,
    ends_once: bool = False,
) -> Cost:
    r"""Independent subnet training as section 4.2 prints it.

    $$\frac{N_0 N_1 + N_{t-1} N_t}{J} + \sum_{i=1}^{l} \frac{N_{i-1} N_i}{n J}
    \quad\text{floats,}\qquad
    4 B \Big[N_0 N_1 + N_{t-1} N_t + \sum_{i=1}^{l} \frac{N_{i-1} N_i}{n}\Big]
    \quad\text{operations.}$$

    Warning: the sums run over all layers ($l$, which the paper does not define, can only be $t$).
    So the first and last layer are counted twice: once whole, and once more with $1/n$. The paper's
    text has $1/n$ for *the other* matrices, $i = 2, ..., t-1$; that is `ends_once=True`. In both
    cases, the floats are only those sent at the beginning of a round. Nothing is returned, no
    worker owns a share, and no moments are sent. The work has two of the three products of a layer.
    `independent_subnets` counts all of it.

    Args:
      widths: `(N_0, ..., N_t)`, with one hidden layer or more.
      batch_size: samples of one worker per gradient step; a step sees n times as many.
      num_workers: number of workers, n.
      local_steps: gradient steps per round, J.
      ends_once: whether to sum over the layers between the first and the last, as the text says.

    Raises:
      ValueError: as `independent_subnets`.
    """
    call, n = "printed_independent_subnets", num_workers
    matrices = _matrices(call, 3, widths, batch_size, n, local_steps)
    summed = matrices[1:-1] if ends_once else matrices
    weights = matrices[0] + matrices[-1] + sum(summed) / n
    return Cost(weights / local_steps, 4 * batch_size * weights, n * batch_size)


def _replicas(matrices: Sequence[int], batch_size: int, num_workers: int, vectors: int):
    floats = 2 * (num_workers - 1) * (sum(matrices) + vectors)
    samples = num_workers * batch_size
    flops = samples * (6 * sum(matrices) - 2 * matrices[0])
    return Cost(float(floats), float(flops), samples)


def _matrices(
    call: str,
    least: int,
    widths: Sequence[int],
    batch_size: int,
    num_workers: int,
    local_steps: int = 1,
):
    if len(widths) < least:
        layer = "layer" if least == 2 else "hidden layer"
        msg = f"{call}(widths={tuple(widths)}): pass (N_0, ..., N_t) with at least one {layer}."
        raise ValueError(msg)
    numbers = {"batch_size": batch_size, "num_workers": num_workers, "local_steps": local_steps}
    for name, value in [*numbers.items(), ("widths", min(widths))]:
        if value < 1:
            given = tuple(widths) if name == "widths" else value
            msg = f"{call}({name}={given}): pass 1 or more."
            raise ValueError(msg)
    return [a * b for a, b in zip(widths, widths[1:])]
