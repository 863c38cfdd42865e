"""`ledger`: the traffic, work and memory of a compiled program, read off its text."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_REFUSED = ("ragged-all-to-all", "collective-broadcast", "send", "recv")
_GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective operation moves.

    Attributes:
      kind: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"`, `"all-to-all"` or
        `"collective-permute"`.
      dtype: XLA's name, such as `"f32"`.
      elements: number of elements of one device's operand, per execution.
      group_size: number of devices that exchange it; the largest group if they differ, and 2 for a
        permute.
      count: executions in one run of the program.
      bytes: bytes sent by all devices together in these executions.
      op_name: its origin, such as `"jit(step)/while/body/psum"`.
    """

    kind: str
    dtype: str
    elements: int
    group_size: int
    count: int
    bytes: int
    op_name: str


class Memory(NamedTuple):
    """Bytes on one device, as the compiler plans them.

    Attributes:
      argument: bytes of the arguments.
      output: bytes of the results.
      temp: bytes of everything between.
      alias: bytes of results stored in donated arguments; they count in both.
    """

    argument: int
    output: int
    temp: int
    alias: int

    @property
    def total(self) -> int:
        return self.argument + self.output + self.temp - self.alias


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Traffic, work and memory of one run of a compiled program.

    Attributes:
      num_devices: number of devices that run it.
      collectives: one entry per array that is sent and place in the program.
      metrics: the same for small arrays, such as a loss, which are not counted in `bytes`.
      flops: operations of matrix products and convolutions on one device.
      custom_calls: targets of calls into other libraries, which are not counted.
      memory: memory on one device; None if only the text was passed.
    """

    num_devices: int
    collectives: tuple[Collective, ...]
    metrics: tuple[Collective, ...]
    flops: int
    custom_calls: tuple[str, ...]
    memory: Memory | None

    @property
    def bytes(self) -> int:
        """Bytes sent by all devices together, without the metrics."""
        return sum(c.bytes for c in self.collectives)

    @property
    def bytes_per_device(self) -> float:
        """Bytes sent per device, on average."""
        return self.bytes / self.num_devices


def ledger(compiled: Any, *, metrics_below: int = 2, trip_count: int | None = None) -> Ledger:
    r"""Count the traffic, work and memory of a compiled program.

    Traffic: let $b$ be the bytes of an operand on each of the $g$ devices of a group. With ring
    algorithms, and without its own slice, a device sends $2b(g-1)/g$ bytes for an all-reduce,
    $b(g-1)$ for an all-gather, $b(g-1)/g$ for a reduce-scatter or an all-to-all, and $b$ for a
    collective-permute from one device to another. A collective over several arrays gives one entry
    per array; the parts of one all-to-all count as one array.

    Work: matrix products and convolutions count two operations per multiplication. In convolutions,
    multiplications with padding and with the zeros of a dilation do not count. Nothing else counts;
    neither does a product that the compiler replaced, for example by a sum.

    The body of a loop counts once per turn (`compiled.cost_analysis()` counts it once). For a
    conditional, the branch with the most bytes counts, and the branch with the most operations.

    Warning: the compiler decides what is in the program. On a CPU it represents bfloat16 as
    float32, which doubles the bytes. It may also move a collective out of a loop, or merge two.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from psjax import cost
      >>> product = jax.jit(lambda a, b: a @ b)
      >>> cost.ledger(product.lower(jnp.ones((2, 3)), jnp.ones((3, 4))).compile()).flops
      48

    Args:
      compiled: `jax.jit(f).lower(*args).compile()`, or its text, `compiled.as_text()`.
      metrics_below: arrays with fewer elements are metrics; by default, scalars.
      trip_count: number of turns to assume for loops that end by their data.

    Raises:
      TypeError: `compiled` is not a compiled program.
      ValueError: a loop with traffic or work has no known trip count, and none was passed; or the
        text has an unknown collective or form of groups.
    """
    if isinstance(compiled, str):
        text, memory = compiled, None
    elif hasattr(compiled, "as_text") and hasattr(compiled, "memory_analysis"):
        text, memory = compiled.as_text() or "", _memory(compiled.memory_analysis())
    else:
        msg = (
            f"ledger(compiled): got {type(compiled).__name__}; "
            "pass jax.jit(f).lower(*args).compile()."
        )
        raise TypeError(msg)
    program = _Program(text, trip_count)
    count = program.count(program.entry)
    small = [c.elements < metrics_below for c in count.collectives]
    return Ledger(
        program.num_devices,
        tuple(c for c, s in zip(count.collectives, small) if not s),
        tuple(c for c, s in zip(count.collectives, small) if s),
        count.flops,
        tuple(sorted(count.custom_calls)),
        memory,
    )


class _Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self):
        return math.prod(self.dims)

    @property
    def bytes(self):
        bits = 8 if self.dtype == "pred" else int(_search(r"(\d+)", self.dtype))
        return -(-self.elements * bits // 8)


class _Instruction(NamedTuple):
    name: str
    arrays: list[_Array]
    opcode: str
    operands: list[str]
    attributes: str


def _memory(stats: Any):
    if stats is None:
        return None
    return Memory(*(int(getattr(stats, f"{name}_size_in_bytes")) for name in Memory._fields))


# --------------------------------------------------------------------------------------- the walk


@dataclasses.dataclass(frozen=True)
class _Count:
    collectives: tuple[Collective, ...] = ()
    flops: int = 0
    custom_calls: frozenset[str] = frozenset()

    def __add__(self, other: "_Count"):
        return _Count(
            self.collectives + other.collectives,
            self.flops + other.flops,
            self.custom_calls | other.custom_calls,
        )

    def times(self, n: int):
        scale = lambda c: dataclasses.replace(c, count=c.count * n, bytes=c.bytes * n)
        return _Count(tuple(map(scale, self.collectives)), self.flops * n, self.custom_calls)


class _Program:
    """The computations of a program's text, and what each costs."""

    def __init__(self, text: str, trip_count: int | None):
        self.computations, self.entry = _parse(text)
        self.trip_count = trip_count
        header = text.split("\n", 1)[0]
        sizes = [re.search(rf"\b{x}=(\d+)", header) for x in ("num_partitions", "replica_count")]
        self.num_partitions, self.num_replicas = (int(m[1]) if m else 1 for m in sizes)
        self.num_devices = self.num_partitions * self.num_replicas
        self.counts = {}

    def count(self, computation: str):
        if computation not in self.counts:
            shapes = {x.name: x.arrays for x in self.computations[computation]}
            counts = (self._instruction(x, shapes) for x in self.computations[computation])
            self.counts[computation] = sum(counts, start=_Count())
        return self.counts[computation]

    def _instruction(self, x: _Instruction, shapes: Mapping[str, Sequence[_Array]]):
        kind = x.opcode.removesuffix("-start")  # of a start and a done, the start counts
        if x.opcode.endswith(("-done", "-update")):
            return _Count()
        operands = [array for name in x.operands for array in shapes.get(name, ())]
        if not operands and kind in (*_KINDS, "dot", "convolution"):
            msg = f"ledger(compiled): %{x.name} has no operands that psjax can read."
            raise ValueError(msg)
        if kind in _KINDS:
            return _Count(collectives=self._collectives(kind, x, operands))
        if kind in _REFUSED and "is_host_transfer=true" not in x.attributes:
            msg = f"ledger(compiled): %{x.name} is a {kind}, whose bytes its text does not tell."
            raise ValueError(msg)
        if kind == "while":
            return self._loop(x)
        called = [self.count(name) for name in _called(x.attributes)]
        if kind == "conditional":
            most = max(called, key=lambda c: sum(y.bytes for y in c.collectives))
            names = frozenset().union(*(c.custom_calls for c in called))
            return _Count(most.collectives, max(c.flops for c in called), names)
        return sum(called, start=_work(kind, x, operands))

    def _loop(self, x: _Instruction):
        condition, body = (
            self.count(_search(rf"\b{name}=%?([^\s,]+)", x.attributes))
            for name in ("condition", "body")
        )
        once = condition + body
        if not (once.collectives or once.flops):
            return once  # nothing to count, however often it runs
        known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', x.attributes)
        trips = int(known[1]) if known else self.trip_count
        if trips is None:
            msg = (
                f"ledger(compiled): loop %{x.name} ({_op_name(x)}) has no known trip count; "
                "pass the number to assume, ledger(compiled, trip_count=...)."
            )
            raise ValueError(msg)
        return condition.times(trips + 1) + body.times(trips)

    def _collectives(self, kind: str, x: _Instruction, operands: Sequence[_Array]):
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", _search(r"pairs=(\{\}|\{.*?\}\})", x.attributes))
            groups, senders = [2], sum(a != b for a, b in pairs)
        else:
            groups = self._groups(kind, x)
            others = sum(g - 1 for g in groups)
            senders = {
                "all-reduce": 2 * others,
                "all-gather": sum(g * (g - 1) for g in groups),
            }.get(kind, others)
        if kind == "all-to-all" and len(operands) > 1:  # one array, cut into one part per device
            dims = (sum(a.elements for a in operands),)
            operands = [operands[0]._replace(dims=dims)]
        return tuple(
            Collective(kind, a.dtype, a.elements, max(groups), 1, senders * a.bytes, _op_name(x))
            for a in operands
        )

    def _groups(self, kind: str, x: _Instruction):
        sizes = _group_sizes(x.attributes, self.num_devices)
        if sum(sizes) == self.num_replicas < self.num_devices and kind != "all-to-all":
            together = "channel_id=" in x.attributes  # all partitions of these replicas
            n = self.num_partitions
            sizes = [n * size for size in sizes] if together else n * sizes
        if sum(sizes) != self.num_devices:
            msg = (
                f"ledger(compiled): the groups of %{x.name} do not hold the program's "
                f"{self.num_devices} devices once each; its text says {x.attributes[:200]!r}."
            )
            raise ValueError(msg)
        return sizes


def _group_sizes(attributes: str, num_devices: int):
    """Devices per group of a collective. XLA writes it in four ways; nothing means all devices."""
    groups = _search(r"replica_groups=(.*)", attributes, "{}")
    if found := re.match(r"\{(\{[\d,{}]+\})\}", groups):  # {{0,1},{2,3}}
        return [len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.match(r"\[(\d+),(\d+)\]<=\[", groups):  # [2,4]<=[4,2]T(1,0)
        return [int(found[2])] * int(found[1])
    # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}: of b's 4 a sub-axis of 2
    if found := re.match(r"mesh\[(.*?)\].*?\{((?:'\w+'(?::\(\d+\)\d+)?(?:, ?)?)+)\}", groups):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        refs = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        size = math.prod(int(part or axes[axis]) for axis, part in refs)
        return [size] * (num_devices // size)
    return [num_devices] if groups.startswith("{}") else []


def _work(kind: str, x: _Instruction, operands: Sequence[_Array]):
    if kind == "dot":
        return _Count(flops=_product(x, operands, r"lhs_contracting_dims=\{([\d,]*)\}"))
    if kind == "convolution":
        return _Count(flops=_convolution(x, *operands[:2]))
    if kind == "custom-call":
        target = _search(r'custom_call_target="([^"]*)"', x.attributes)
        if target in _GEMMS:
            dims = r'lhs_contracting_dimensions\\?":\[([\d,"\\]*)\]'
            return _Count(flops=_product(x, operands, dims))
        return _Count(custom_calls=frozenset([target]))
    return _Count()


def _product(x: _Instruction, operands: Sequence[_Array], pattern: str):
    contracted = re.findall(r"\d+", _search(pattern, x.attributes))
    return 2 * x.arrays[0].elements * math.prod(operands[0].dims[int(d)] for d in contracted)


def _convolution(x: _Instruction, image: _Array, kernel: _Array):
    """Twice the number of pairs of an output and a weight that use an entry of the image."""
    output = x.arrays[0]
    window = {
        name: [int(value.split("_")[0]) for value in values.split("x")]
        for name, values in re.findall(
            r"(\w+)=(\S+)", _search(r"window=\{(.*?)\}", x.attributes, "")
        )
    }
    of_image, of_kernel, of_output = re.split("_|->", _search(r"labels=([^\s,]+)", x.attributes))
    flops = 2 * output.elements * kernel.dims[of_kernel.index("i")]
    defaults = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1, "pad": 0}
    for d, size in enumerate(window.get("size", ())):
        stride, base, dilation, low = (
            window[name][d] if name in window else default for name, default in defaults.items()
        )
        width, outputs = (
            array.dims[labels.index(str(d))]
            for array, labels in ((image, of_image), (output, of_output))
        )
        at = stride * np.arange(outputs)[:, None] + dilation * np.arange(size) - low
        meets = (at >= 0) & (at % base == 0) & (at // base < width)
        flops = flops // outputs * int(np.sum(meets))
    return flops


# --------------------------------------------------------------------------------------- the text


def _parse(text: str):
    """`{computation: [instruction, ...]}`, and the name of the entry computation."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([^\s(]+) \(.*-> .*\{$", line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (
            found := re.match(r"\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z\d-]*)\((.*)$", line)
        ):
            name, shape, opcode, rest = found.groups()
            end = _closing(rest)
            operands = re.findall(r"%([^\s,)]+)", rest[:end])
            current.append(_Instruction(name, _arrays(shape), opcode, operands, rest[end:]))
    if entry is None:
        msg = (
            "ledger(compiled): this text is not of a compiled program; "
            "pass jax.jit(f).lower(*args).compile().as_text()."
        )
        raise ValueError(msg)
    return computations, entry


def _closing(text: str):
    """The end of the parenthesis that was opened before."""
    depth = 1
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(text)


def _arrays(shape: str):
    found = re.findall(r"\b(pred|(?:bf|[fsuc])\d+\w*)\[([\d,<=]*)\]", shape)
    return [_Array(x, tuple(int(d) for d in re.findall(r"\d+", dims))) for x, dims in found]


def _called(attributes: str):
    """Names of the computations that an instruction calls, except those of a loop."""
    names = re.findall(r"\b(?:to_apply|calls|\w+_computation)=%?([^\s,}]+)", attributes)
    for several in re.findall(r"\b(?:branch|called)_computations=\{([^}]*)\}", attributes):
        names += re.findall(r"%?([^\s,]+)", several)
    return names


def _op_name(x: _Instruction):
    return _search(r'op_name="([^"]*)"', x.attributes, "")


def _search(pattern: str, text: str, default: str | None = None):
    found = re.search(pattern, text)
    if found is None:
        if default is None:
            msg = f"ledger(compiled): no {pattern} in {text[:200]!r}, which psjax expects there."
            raise ValueError(msg)
        return default
    return found[1]
