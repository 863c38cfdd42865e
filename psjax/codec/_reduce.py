"""Sums over workers whose parts are encoded: all_to_all, decode, add, encode, all_gather."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr
from jaxtyping import Array

from psjax._placement import varying
from psjax._sums import wide
from psjax.codec._codecs import Codec, ErrorFeedback


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key",),
    meta_fields=("codec", "axis_name"),
)
@dataclasses.dataclass(frozen=True)
class Wire:
    """A codec between the workers of a mapped axis, in one round.

    Attributes:
      codec: of what is sent.
      axis_name: of the workers.
      key: a PRNG key that differs between rounds; workers may share it. None: rounding is to the
        nearest.
    """

    codec: Codec
    axis_name: str
    key: Any

    def split(self, n: int) -> "Wire":
        """Of n turns of a round, for `jax.lax.scan`: each with a key of its own."""
        if self.key is None:
            return self
        return dataclasses.replace(self, key=jax.random.split(jax.random.fold_in(self.key, n), n))

    def total(self, shares: Sequence[Array], divide: int = 1):
        """The sum over the workers, and what each of them has lost.

        Every worker owns a shard of all entries, end to end. It gets that shard of everybody's
        shares, decodes and adds, and sends the encoded sum to all.

        Args:
          shares: this worker's arrays.
          divide: the sum is divided by it before it is sent.

        Returns:
          `(sums, lost)`, both like `shares`. The sums over the workers of `sums * divide` and of
          `lost` add up to that of `shares`: what the owner of a shard loses is its own.
        """
        if self.codec.exact or not shares:
            sums = jax.lax.psum(list(shares), self.axis_name)
            sums = [x / divide for x in sums] if divide > 1 else sums
            return sums, [jnp.zeros_like(x) for x in shares]
        n, me = jax.lax.axis_size(self.axis_name), jax.lax.axis_index(self.axis_name)
        flat, size = _flat(shares), sum(x.size for x in shares)
        length = _padded(-(-size // n), self.codec.block)
        rows = jnp.pad(flat, (0, n * length - size)).reshape(n, length)
        packed, kept = self._encoded(0, rows)
        lost = rows - kept
        received = [jax.lax.all_to_all(x, self.axis_name, 0, 0) for x in packed]
        mine = jnp.sum(self._decoded(received, rows), axis=0) / divide
        packed, kept = self._encoded(1, mine[None])
        error = (mine - kept[0]) * divide
        lost = lost.at[me].add(error)
        sums = self._decoded([_gathered(x[0], self.axis_name) for x in packed], rows)
        return _apart(sums.reshape(-1), shares), _apart(lost.reshape(-1), shares)

    def to_owners(self, differences: Sequence[Array]):
        """Row i of every array to worker i; and what of one's own rows is decoded there.

        Args:
          differences: arrays `[worker, ...]`.

        Returns:
          `(received, decoded)`, arrays `[worker, ...]`: of every worker the row for this one, and
          this worker's own rows as the others decode them.
        """
        if self.codec.exact or not differences:
            swap = lambda x: jax.lax.all_to_all(x, self.axis_name, 0, 0)
            return [swap(x) for x in differences], list(differences)
        dtype = _together(differences)
        rows = jnp.concatenate([x.reshape(len(x), -1).astype(dtype) for x in differences], axis=1)
        size = rows.shape[1]
        rows = jnp.pad(rows, ((0, 0), (0, _padded(size, self.codec.block) - size)))
        packed, kept = self._encoded(2, rows)
        received = [jax.lax.all_to_all(x, self.axis_name, 0, 0) for x in packed]
        arrived = self._decoded(received, rows)
        own = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in differences]
        return tuple(list(jax.vmap(lambda y: _apart(y, own))(x)) for x in (arrived, kept))

    def rows(self, sent: Sequence[Array], move: Callable[[list[Array]], list[Array]]):
        """Arrays of one shape each, encoded, moved to other workers by `move`, and decoded.

        Args:
          sent: this worker's arrays.
          move: a list of packed arrays to what arrives in their places.
        """
        if self.codec.exact:
            return move(list(sent))
        packed = []
        for i, x in enumerate(sent):
            flat = x.reshape(1, -1).astype(wide(x.dtype))
            flat = jnp.pad(flat, ((0, 0), (0, _padded(x.size, self.codec.block) - x.size)))
            packed.append([y[0] for y in self._encoded(3 + i, flat)[0]])
        parts = [move(list(part)) for part in zip(*packed)]
        found = []
        for x, *arrived in zip(sent, *parts):
            size = _padded(x.size, self.codec.block)
            flat = jax.ShapeDtypeStruct((size,), wide(x.dtype))
            found.append(_apart(self.codec.decode(arrived, flat), [x])[0])
        return found

    def _encoded(self, use: int, rows: Array):
        """The packed arrays `[row, ...]`, and the rows as they are decoded."""
        keys = None
        if self.key is not None:
            me = jax.lax.axis_index(self.axis_name)
            keys = jax.random.fold_in(jax.random.fold_in(self.key, use), me)
            keys = jax.random.split(keys, len(rows))
        packed = jax.vmap(self.codec.encode, in_axes=(None if keys is None else 0, 0))(keys, rows)
        return packed, self._decoded(packed, rows)

    def _decoded(self, packed: Sequence[Array], like: Array):
        row = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
        return jax.vmap(lambda one: self.codec.decode(one, row))(tuple(packed))


def wire_of(codec: Codec | None, axis_name: str, key: Any) -> Wire | None:
    """A wire for gradients, or None where nothing is to be encoded."""
    return None if codec is None or codec.exact else Wire(codec, axis_name, key)


def check_codec(call: str, codec: Codec | None):
    """Raise where a codec keeps an error from step to step and there is no state for it."""
    if isinstance(codec, ErrorFeedback):
        msg = (
            f"{call}(codec={codec!r}): this step keeps no error from call to call; pass a codec "
            "that rounds stochastically, such as psjax.codec.int8(), and a key at every step."
        )
        raise ValueError(msg)


def mean(tree: Any, axis_name: str, codec: Codec, key: Any = None, residual: Any = None) -> Any:
    r"""The mean over the workers of a mapped axis, sent in encoded parts.

    Call it inside `jax.pmap`, `jax.shard_map` or `jax.vmap(..., axis_name=...)`, on the gradients
    of data parallelism or on what local steps changed. Do not encode weights: the scale of a block
    is set by its largest entry, and a change is much smaller.

    All leaves are joined end to end and cut into one shard per worker, padded to whole blocks.
    Every worker sends each shard to its owner, encoded, by one `all_to_all` per packed array. The
    owner decodes, takes the mean, encodes it and sends it to all by `all_gather`. All workers get
    the same bits. With B the codec's bytes of a shard, each of n workers sends $2 (n-1) B$. The
    identity is one exact `psum`.

    Args:
      tree: arrays of floats, other ones on every worker.
      axis_name: of the mapped axis.
      codec: such as `psjax.codec.int8()`.
      key: a PRNG key for stochastic rounding, another one in every step; workers may share it. None
        rounds to the nearest.
      residual: with `error_feedback`, what was lost so far: zeros like `tree` at first. It is each
        worker's own.

    Returns:
      A tree like `tree`, the same on all workers; with a residual, `(tree, residual)`.

    Raises:
      TypeError: a leaf that is not of real floats.
      ValueError: `error_feedback` without a residual, or a residual without it.

    Example:
      Four workers, simulated on one device.

      >>> import jax, jax.numpy as jnp, psjax
      >>> codec, key = psjax.codec.int8(block=4), jax.random.key(0)
      >>> x = jnp.array([[127.0], [127.0], [0.0], [0.0]])
      >>> mean = lambda x: psjax.codec.mean(x, "workers", codec, key)
      >>> jax.vmap(mean, out_axes=None, axis_name="workers")(x)
      Array([63.5], dtype=float32)
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            kind = jnp.dtype(jnp.result_type(x)).name
            msg = (
                f"mean(tree): {keystr(path) or 'the tree'} is {kind}{list(jnp.shape(x))}; pass "
                "floats, and take the mean of the rest by jax.lax.pmean."
            )
            raise TypeError(msg)
    feedback = isinstance(codec, ErrorFeedback)
    if feedback != (residual is not None):
        need = "needs residual=, zeros like the tree at first" if feedback else "has no residual="
        msg = f"mean(codec={codec!r}): this codec {need}; error_feedback(codec) is what keeps one."
        raise ValueError(msg)
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jnp.asarray(x) for x in leaves]
    wire, sent = Wire(codec, axis_name, key), leaves
    if feedback:
        sent = [x + e for x, e in zip(leaves, jax.tree.leaves(residual), strict=True)]
    sums, lost = wire.total(sent, jax.lax.axis_size(axis_name))
    return (
        (treedef.unflatten(sums), treedef.unflatten(lost)) if feedback else treedef.unflatten(sums)
    )


def _gathered(x: Array, axis_name: str):
    """All workers' arrays, the same on all; `jax.shard_map(check_vma=True)` is told so."""
    checked = axis_name in varying(x)
    return jax.lax.all_gather(x, axis_name, to="invarying" if checked else "varying")


def _together(arrays: Sequence[Array]):
    return wide(jnp.result_type(*arrays))


def _flat(arrays: Sequence[Array]):
    """All entries, end to end, in 32 bits at least."""
    dtype = _together(arrays)
    return jnp.concatenate([x.reshape(-1).astype(dtype) for x in arrays])


def _apart(flat: Array, like: Sequence[Any]):
    """Arrays like `like` of what lies end to end, and padding behind it."""
    found, at = [], 0
    for x in like:
        size = math.prod(x.shape)
        found.append(flat[at : at + size].reshape(x.shape).astype(x.dtype))
        at += size
    return found


def _padded(size: int, block: int):
    return -(-size // block) * block
