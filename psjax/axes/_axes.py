"""What is known of the axes of a function's parameters: a tree of specs that explains itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from psjax._notation import terms
from psjax.axes._atoms import Reason

KINDS = ("hidden", "output", "input", "normalised")


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis whose rows can be permuted in all leaves that have it.

    Attributes:
      name: of the axis.
      size: rows.
      kind: `hidden`, `output` (the results have it too), `input` (the inputs have it too),
        or `normalised`: hidden, but its rows are not independent.
      leaves: `(path, dimension)` of every place.
      coupled: why its rows are not independent; None where they are.
    """

    name: str
    size: int
    kind: str
    leaves: tuple[tuple[str, int], ...]
    coupled: Reason | None = None

    @property
    def divisible(self) -> bool:
        """Whether a part of the rows is a network of its own (see `psjax.narrow`)."""
        return self.coupled is None and self.kind != "input"


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A dimension whose rows are told apart, or a factor of one.

    Attributes:
      path: of the leaf.
      dim: which dimension.
      size: rows.
      reason: what tells them apart.
    """

    path: str
    dim: int
    size: int
    reason: Reason


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """Axes of the parameters of a function; made by `psjax.infer_axes`.

    Every function of psjax takes it as `axes`. `print` shows it as a table.

    Attributes:
      specs: tree of `PartitionSpec`s like the parameters.
      like: tree of `jax.ShapeDtypeStruct`s of them.
      axes: `{name: Axis}`, in the order of depth.
      fixed: every dimension that is in no axis, with the reason.
      inputs: specs of the inputs' leaves.
      outputs: specs of the results' leaves.
      unknown: `{primitive: times}` of those without a rule.
    """

    specs: Any
    like: Any
    axes: dict[str, Axis]
    fixed: tuple[Fixed, ...]
    inputs: tuple[P, ...]
    outputs: tuple[P, ...]
    unknown: dict[str, int]

    def __call__(self, params: Any) -> Any:
        """The tree of specs of parameters like these, as `psjax.select(axes=...)` asks for it."""
        shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree)
        if shapes(params) != shapes(self.like):
            msg = (
                "Axes: the parameters have other shapes than those of infer_axes(apply, params); "
                "call infer_axes with these."
            )
            raise ValueError(msg)
        return self.specs

    def __getitem__(self, name: str) -> Axis:
        """The axis of a name."""
        return self.axes[name]

    @property
    def sizes(self) -> dict[str, int]:
        """`{name: rows}` of every axis."""
        return {name: axis.size for name, axis in self.axes.items()}

    @property
    def divisible(self) -> dict[str, int]:
        """`{name: rows}` of the hidden axes whose subnets are independent.

        As `sizes` of `psjax.ist.membership` and `psjax.random_partition`.
        """
        return {
            name: axis.size
            for name, axis in self.axes.items()
            if axis.kind == "hidden" and axis.divisible
        }

    def shares(self, num_subnets: int) -> dict[str, int]:
        """`{name: rows}` that a subnet has of each of `divisible`: its size over n, rounded up.

        As `sizes` of `psjax.narrow`; where n does not divide a size, some subnets have a row less,
        and `psjax.ist.membership` fills it up with zeros.

        Raises:
          ValueError: fewer rows than subnets.
        """
        for name, size in self.divisible.items():
            if not 1 <= num_subnets <= size:
                msg = (
                    f"Axes.shares({num_subnets}): axis {name!r} has {size} rows; pass a number of "
                    f"subnets from 1 to {size}, or choose among the axes yourself."
                )
                raise ValueError(msg)
        return {name: -(-size // num_subnets) for name, size in self.divisible.items()}

    def rename(self, **names: str) -> "Axes":
        """The same with other names; two axes of one size may get one name, and are then one.

        Args:
          **names: `old="new"`.

        Raises:
          ValueError: no such axis; two axes of different sizes or kinds with one name.
        """
        missing = sorted(set(names) - set(self.axes))
        if missing:
            msg = f"Axes.rename: no axis {missing[0]!r}; pass one of {list(self.axes)}."
            raise ValueError(msg)
        found: dict[str, Axis] = {}
        for name, axis in self.axes.items():
            new = names.get(name, name)
            if new in found:
                axis = _merged(new, found[new], axis)
            found[new] = axis
        found = {name: dataclasses.replace(axis, name=name) for name, axis in found.items()}
        spec = lambda s: P(*(_renamed(entry, names) for entry in s))
        is_spec = lambda s: isinstance(s, P)
        return dataclasses.replace(
            self,
            specs=jax.tree.map(spec, self.specs, is_leaf=is_spec),
            axes=found,
            inputs=tuple(map(spec, self.inputs)),
            outputs=tuple(map(spec, self.outputs)),
        )

    def __str__(self):
        """The table."""
        head = ("axis", "size", "kind", "leaves and dimensions")
        rows: list[tuple[str, ...]] = [head]
        for name, axis in self.axes.items():
            rows.append((name, str(axis.size), axis.kind, _places(axis.leaves)))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:{widths[2]}}  {d}".rstrip()
            for a, b, c, d in rows
        ]
        coupled = [axis for axis in self.axes.values() if axis.coupled is not None]
        if coupled:
            lines += ["", "not divisible into independent parts:"]
            lines += [f"  {axis.name}: {axis.coupled}" for axis in coupled]
        if self.fixed:
            lines += ["", "fixed:"]
            groups: dict[str, list[str]] = {}
            for own in self.fixed:
                place = f"{own.path} {own.dim} (size {own.size})"
                groups.setdefault(str(own.reason), []).append(place)
            lines += [f"  {reason}: {_few(places)}" for reason, places in groups.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _merged(name, one, two):
    if one.size != two.size or one.kind != two.kind:
        msg = (
            f"Axes.rename: {one.name!r} ({one.size}, {one.kind}) and {two.name!r} ({two.size}, "
            f"{two.kind}) cannot both be {name!r}; they must have one size and kind."
        )
        raise ValueError(msg)
    return dataclasses.replace(
        one, leaves=one.leaves + two.leaves, coupled=one.coupled or two.coupled
    )


def _renamed(entry: str | None, names: Mapping[str, str]) -> str | None:
    if entry is None:
        return None
    return "+".join("*".join(str(names.get(str(x), x)) for x in term) for term in terms(entry))


def _places(leaves):
    by_path: dict[str, list[str]] = {}
    for path, dim in leaves:
        by_path.setdefault(path, []).append(str(dim))
    return _few([f"{path} {','.join(dict.fromkeys(dims))}" for path, dims in by_path.items()], 4)


def _few(items, most=3):
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
