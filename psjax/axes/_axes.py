"""`Axes`, the result of `infer_axes`: a tree of specs with the reasons for each."""

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
      name: name of the axis.
      size: number of rows.
      kind: `hidden`; `output`, if the results have it; `input`, if the inputs have it; or
        `normalised`, hidden but with rows that are not independent.
      leaves: `(path, dimension)` of every place where it occurs.
      coupled: why its rows are not independent; None if they are.
    """

    name: str
    size: int
    kind: str
    leaves: tuple[tuple[str, int], ...]
    coupled: Reason | None = None

    @property
    def divisible(self) -> bool:
        """Whether some of the rows make an independent network (see `psjax.narrow`)."""
        return self.coupled is None and self.kind != "input"


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A dimension, or a factor of one, that has no axis because its rows cannot be permuted.

    Attributes:
      path: path of the leaf.
      dim: number of the dimension.
      size: number of rows.
      reason: which step of the program tells the rows apart.
    """

    path: str
    dim: int
    size: int
    reason: Reason


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """The axes of a function's parameters, as `psjax.infer_axes` returns them.

    Pass it as `axes` to any function of psjax. `print` shows it as a table.

    Attributes:
      specs: tree of `PartitionSpec`s like the parameters.
      like: the parameters as `jax.ShapeDtypeStruct`s.
      axes: `{name: Axis}`, in the order of depth.
      fixed: every dimension that is in no axis, with the reason.
      inputs: specs of the leaves of the inputs.
      outputs: specs of the leaves of the results.
      unknown: `{primitive: number of uses}` for JAX primitives without a rule.
    """

    specs: Any
    like: Any
    axes: dict[str, Axis]
    fixed: tuple[Fixed, ...]
    inputs: tuple[P, ...]
    outputs: tuple[P, ...]
    unknown: dict[str, int]

    def __call__(self, params: Any) -> Any:
        """The tree of specs, once the shapes of the parameters are checked."""
        shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree)
        if shapes(params) != shapes(self.like):
            msg = (
                "Axes: the parameters have other shapes than those of infer_axes(apply, params); "
                "call infer_axes with these."
            )
            raise ValueError(msg)
        return self.specs

    def __getitem__(self, name: str) -> Axis:
        """The axis with this name."""
        return self.axes[name]

    @property
    def sizes(self) -> dict[str, int]:
        """`{name: rows}` of every axis."""
        return {name: axis.size for name, axis in self.axes.items()}

    @property
    def divisible(self) -> dict[str, int]:
        """`{name: rows}` of the hidden axes that can be divided into independent subnets.

        Pass it as `sizes` to `psjax.ist.membership` and `psjax.random_partition`.
        """
        return {
            name: axis.size
            for name, axis in self.axes.items()
            if axis.kind == "hidden" and axis.divisible
        }

    def shares(self, num_subnets: int) -> dict[str, int]:
        """`{name: rows}` of one of n subnets: each size in `divisible` over n, rounded up.

        Pass it as `sizes` to `psjax.narrow`. If n does not divide a size, some subnets have one row
        less, and `psjax.ist.membership` pads them.

        Raises:
          ValueError: an axis has fewer rows than there are subnets.
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
        """Rename axes. Two axes of one size and kind that get one name become one axis.

        Args:
          **names: `old="new"`.

        Raises:
          ValueError: there is no such axis, or axes of different sizes or kinds get one name.
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
        """The axes as a table."""
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
            f"{two.kind}) cannot both be {name!r}; they must have the same size and kind."
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
