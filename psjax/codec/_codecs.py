"""Codecs: an array as packed bits, and back."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from psjax._sums import wide


@dataclasses.dataclass(frozen=True)
class Codec:
    """An array of floats as a tuple of packed arrays, and back; made by the functions here."""

    @property
    def block(self) -> int:
        """What the number of entries must be a multiple of."""
        return 1

    @property
    def exact(self) -> bool:
        """Whether nothing is encoded and nothing lost."""
        return False

    def encode(self, key: Any, x: Any) -> tuple[Array, ...]:
        """The packed arrays of an array of floats, of any shape.

        Args:
          key: a PRNG key for stochastic rounding; None rounds to the nearest.
          x: an array of floats, the number of whose entries `block` divides.

        Raises:
          TypeError: an array that is not of real floats.
          ValueError: a number of entries that `block` does not divide.
        """
        dtype, size = jnp.result_type(x), jnp.size(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            msg = (
                f"{self!r}.encode: the array is {jnp.dtype(dtype).name}{list(jnp.shape(x))}; pass "
                "floats. Whole numbers, such as counts, must be sent as they are."
            )
            raise TypeError(msg)
        if size % self.block:
            msg = (
                f"{self!r}.encode: an array of {size} entries is not a whole number of blocks of "
                f"{self.block}; pad it, or call psjax.codec.mean, which does."
            )
            raise ValueError(msg)
        return self._encode(key, jnp.ravel(x))

    def decode(self, packed: Sequence[Any], like: Any) -> Array:
        """The array that was encoded, as far as it was kept.

        Args:
          packed: what `encode` returned.
          like: an array or `jax.ShapeDtypeStruct` with the shape and the dtype of the result.
        """
        size = math.prod(like.shape)
        return self._decode(packed, size, like.dtype).reshape(like.shape)

    def bytes(self, shape: Sequence[int], dtype: Any) -> int:
        """Bytes of what `encode` returns for an array of this shape and dtype."""
        struct = jax.ShapeDtypeStruct(tuple(shape), dtype)
        packed = jax.eval_shape(lambda x: self.encode(None, x), struct)
        return sum(x.size * x.dtype.itemsize for x in packed)

    def _encode(self, key: Any, x: Array) -> tuple[Array, ...]:
        raise NotImplementedError

    def _decode(self, packed: Sequence[Any], size: int, dtype: DTypeLike) -> Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, repr=False)
class Identity(Codec):
    """Nothing is encoded."""

    def __repr__(self) -> str:
        return "identity()"

    @property
    def exact(self) -> bool:
        return True

    def _encode(self, key: Any, x: Array):
        del key
        return (x,)

    def _decode(self, packed: Sequence[Any], size: int, dtype: DTypeLike):
        return packed[0].astype(dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Cast(Codec):
    """Another dtype of floats, sent as whole numbers of its size: no compiler widens these."""

    dtype: str

    def __repr__(self) -> str:
        return f"cast({self.dtype})"

    def _encode(self, key: Any, x: Array):
        del key
        narrow = x.astype(self.dtype)
        return (jax.lax.bitcast_convert_type(narrow, f"uint{8 * narrow.dtype.itemsize}"),)

    def _decode(self, packed: Sequence[Any], size: int, dtype: DTypeLike):
        return jax.lax.bitcast_convert_type(packed[0], self.dtype).astype(dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Integers(Codec):
    """Whole numbers of few bits, with a scale for each block."""

    bits: int
    size: int

    def __repr__(self) -> str:
        return f"int{self.bits}({self.size})"

    @property
    def block(self) -> int:
        return self.size

    @property
    def _largest(self):
        return 2 ** (self.bits - 1) - 1

    def _encode(self, key: Any, x: Array):
        x = x.astype(wide(x.dtype)).reshape(-1, self.size)
        most = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        scale = jnp.where(jnp.isfinite(most), most / self._largest, jnp.full_like(most, jnp.nan))
        scale = jnp.where(scale < jnp.finfo(x.dtype).tiny, jnp.zeros_like(scale), scale)
        steps = x / jnp.where(scale > 0, scale, jnp.ones_like(scale))
        steps = jnp.where(scale > 0, steps, jnp.zeros_like(steps))
        if key is None:
            steps = jnp.round(steps)
        else:
            steps = jnp.floor(steps + jax.random.uniform(key, x.shape, x.dtype))
        codes = jnp.clip(steps, -self._largest, self._largest).astype(jnp.int8)
        return _packed(codes.reshape(-1), self.bits), scale[:, 0]

    def _decode(self, packed: Sequence[Any], size: int, dtype: DTypeLike):
        codes, scale = packed
        steps = _unpacked(codes, self.bits).reshape(-1, self.size).astype(scale.dtype)
        return (steps * scale[:, None]).reshape(-1).astype(dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class TopK(Codec):
    """The entries that are largest in absolute value, and where they are."""

    fraction: float

    def __repr__(self) -> str:
        return f"top_k({self.fraction})"

    def _encode(self, key: Any, x: Array):
        del key
        count = max(1, math.ceil(self.fraction * x.size)) if x.size else 0
        size = jnp.where(jnp.isnan(x), jnp.full_like(x, jnp.inf), jnp.abs(x))
        places = jax.lax.top_k(size, count)[1]
        bits = next(b for b in (8, 16, 32) if x.size <= 2**b)
        return x[places], places.astype(f"uint{bits}")

    def _decode(self, packed: Sequence[Any], size: int, dtype: DTypeLike):
        values, places = packed
        return jnp.zeros(size, dtype).at[places].set(values.astype(dtype), unique_indices=True)


@dataclasses.dataclass(frozen=True, repr=False)
class ErrorFeedback(Codec):
    """Another codec, rounding to the nearest; what it loses is kept and added to the next array."""

    codec: Codec

    def __repr__(self) -> str:
        return f"error_feedback({self.codec!r})"

    @property
    def block(self) -> int:
        return self.codec.block

    def _encode(self, key: Any, x: Array):
        del key
        return self.codec.encode(None, x)

    def _decode(self, packed: Sequence[Any], size: int, dtype: DTypeLike):
        return self.codec.decode(packed, jax.ShapeDtypeStruct((size,), dtype))


def _packed(codes: Array, bits: int):
    """int8 codes of few bits, several to a byte."""
    if bits == 8:
        return codes
    parts = codes.astype(jnp.uint8).reshape(-1, 8 // bits) & jnp.uint8(2**bits - 1)
    total = parts[:, 0]
    for i in range(1, 8 // bits):
        total = total | (parts[:, i] << jnp.uint8(i * bits))
    return total


def _unpacked(packed: Array, bits: int):
    """The int8 codes of what `_packed` returned."""
    if bits == 8:
        return packed
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    parts = (packed[:, None] >> shifts) & jnp.uint8(2**bits - 1)
    sign = jnp.uint8(2 ** (bits - 1))
    return ((parts ^ sign).astype(jnp.int8) - sign.astype(jnp.int8)).reshape(-1)


# ------------------------------------------------------------------------------------ as functions


def identity() -> Codec:
    """No compression: every array as it is.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> psjax.codec.identity().bytes((10,), jnp.float32)
      40
    """
    return Identity()


def cast(dtype: Any) -> Codec:
    """Another dtype of floats on the wire, such as `jnp.bfloat16`; values are rounded to it.

    Args:
      dtype: of floats. What is too large for it becomes Inf: float16 ends at 65504.

    Raises:
      TypeError: a dtype that is not of real floats.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> psjax.codec.cast(jnp.bfloat16).bytes((10,), jnp.float32)
      20
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        msg = f"cast(dtype={jnp.dtype(dtype).name}): pass a dtype of floats, such as jnp.bfloat16."
        raise TypeError(msg)
    return Cast(jnp.dtype(dtype).name)


def int8(block: int = 64) -> Codec:
    r"""Whole numbers from -127 to 127, with one scale for each block of entries.

    The scale of a block is its largest absolute value, divided by 127; for float32 and narrower it
    is a float32. With a key, an entry $x$ becomes one of its two neighbours $a \le x < b$ on the
    grid, $b$ with probability $(x-a)/(b-a)$, so that the expectation of what is decoded is $x$:
    stochastic rounding as in D. Alistarh et al., *QSGD*, arXiv:1610.02132. Zero stays zero.

    A block with an entry that is NaN or Inf is decoded as NaN, all of it. A block whose scale is
    below the smallest normal number is decoded as zeros.

    Args:
      block: entries with one scale.

    Raises:
      ValueError: a block that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, psjax
      >>> codec = psjax.codec.int8(block=4)
      >>> x = jnp.array([1.0, -127.0, 0.0, 2.5])
      >>> codes, scale = codec.encode(jax.random.key(0), x)
      >>> codes[:3], scale
      (Array([   1, -127,    0], dtype=int8), Array([1.], dtype=float32))
    """
    return _integers("int8", 8, block)


def int4(block: int = 64) -> Codec:
    """Whole numbers from -7 to 7, two to a byte, with one scale for each block of entries.

    Rounding, NaN and zeros are as in `int8`.

    Args:
      block: entries with one scale; even.

    Raises:
      ValueError: a block that is not positive, or odd.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> psjax.codec.int4(block=32).bytes((64,), jnp.float32)  # 32 of numbers, 8 of scales
      40
    """
    return _integers("int4", 4, block)


def int2(block: int = 64) -> Codec:
    """-1, 0 and 1, four to a byte, with one scale for each block of entries.

    Rounding, NaN and zeros are as in `int8`. With a key it is W. Wen et al., *TernGrad*,
    arXiv:1705.07878, by blocks; that is coarse, and `error_feedback` around it is the usual form.

    Args:
      block: entries with one scale; a multiple of 4.

    Raises:
      ValueError: a block that is not positive, or that 4 does not divide.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> psjax.codec.int2(block=64).bytes((64,), jnp.float32)
      20
    """
    return _integers("int2", 2, block)


def top_k(fraction: float) -> Codec:
    """The entries that are largest in absolute value, and where they are; the others are zero.

    Places are sent in 8, 16 or 32 bits, as the array needs. NaN counts as the largest. What is
    decoded is not the array in expectation, so that `error_feedback` belongs around it.

    In a reduction (`psjax.codec.mean`) the fraction is one of each worker's shard.

    Args:
      fraction: of the entries that are sent, in (0, 1]; one entry at least.

    Raises:
      ValueError: a fraction outside (0, 1].

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> codec, x = psjax.codec.top_k(0.5), jnp.array([1.0, -3.0, 2.0, 0.5])
      >>> codec.decode(codec.encode(None, x), x)
      Array([ 0., -3.,  2.,  0.], dtype=float32)
    """
    if not 0 < fraction <= 1:
        msg = f"top_k(fraction={fraction}): pass a fraction of the entries, above 0 and up to 1."
        raise ValueError(msg)
    return TopK(float(fraction))


def error_feedback(codec: Codec) -> Codec:
    r"""What a codec loses is kept, and added to the next array that goes the same way.

    J. Seide et al., *1-Bit Stochastic Gradient Descent*, 2014; S. P. Karimireddy et al., *Error
    Feedback Fixes SignSGD and other Gradient Compression Schemes*, arXiv:1901.09847. With
    $e_0 = 0$, a round sends $c_t = Q(x_t + e_t)$ and keeps $e_{t+1} = x_t + e_t - c_t$: what was
    sent in all rounds and what is kept add up to what was to be sent. The codec rounds to the
    nearest, for stochastic rounding of few bits may lose more than it was given, and the error
    would grow.

    What is kept, the residual, belongs to `psjax.codec.compress`'s state, or goes in and out of
    `psjax.codec.mean`.

    Args:
      codec: such as `int2(64)` or `top_k(0.01)`.

    Raises:
      TypeError: error feedback of error feedback.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> psjax.codec.error_feedback(psjax.codec.top_k(0.25)).bytes((8,), jnp.float32)
      10
    """
    if isinstance(codec, ErrorFeedback):
        msg = f"error_feedback({codec!r}): pass the codec inside; the error is kept once."
        raise TypeError(msg)
    return ErrorFeedback(codec)


def _integers(name: str, bits: int, block: int):
    to_a_byte = 8 // bits
    if block < 1 or block % to_a_byte:
        several = f"a multiple of {to_a_byte}, for as many numbers share a byte" * (to_a_byte > 1)
        msg = f"{name}(block={block}): pass {several or 'a positive number of entries'}."
        raise ValueError(msg)
    return Integers(bits, block)
