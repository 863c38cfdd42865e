"""`draw`: which weights each score depends on, as in figures 1, 3 and 5 of the paper.

The public names are in `psjax.structure`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import KeyPath, keystr

from psjax.structure._dependencies import Dependencies

# Okabe and Ito's colours, which colour-blind readers can tell apart, then three more.
_COLOURS = (
    """#0072B2 #E69F00 #D55E00 #56B4E9 #009E73 #CC79A7 #F0E442 #7F5AA8 #8C564B #8FBC3F""".split()
)
_COMMON, _SOME, _EDGE, _TEXT = "#BDBDBD", "#7A7A7A", "#8C8C8C", "#303030"
_DOTTED = (0, (1, 1.5))
_ROW, _GAP = 1.0, 0.55  # height of a layer, and of the space to the next
_MOST_LABELS = 20
_LEAST_PART = 0.2  # of a layer's height, for a part with few weights


@dataclasses.dataclass
class _Part:
    """Weights of a layer that the same number of scores depends on.

    Attributes:
      sizes: number of weights; for weights of single classes, one number per class.
      kept: number of weights that are not dropped.
    """

    sizes: np.ndarray
    kept: np.ndarray

    def __add__(self, other: "_Part"):
        return _Part(self.sizes + other.sizes, self.kept + other.kept)


def draw(
    dependencies: Dependencies, ax: Any = None, keep: Any = None, title: str | None = None
) -> Any:
    r"""Draw the layers of a network, coloured by the scores that depend on them.

    There is one row per layer, from the input at the bottom to the scores at the top, and one
    column and colour per class. A block in the colour of a class stands for weights that only this
    score depends on; a grey block across all columns stands for the common weights. Coloured bands
    lead from layer to layer to the blocks of a class. So score $j$ depends on everything in its
    column. These are figures 1 and 3 of the paper; with `keep`, it is figure 5, where dropped
    weights have dotted outlines.

    Needs matplotlib: `pip install psjax[experiments]`.

    Args:
      dependencies: what `psjax.structure.dependencies` returned.
      ax: matplotlib axes. Default: the axes of a new figure, 7 inches wide.
      keep: None, or a mask as in `Selection.drop`: the weights that remain under dropout.
      title: text above the picture and the counts. Default: only the counts.

    Returns:
      The matplotlib axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError, TypeError: from `Selection.drop`.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> apply = lambda w, x: jnp.tanh(x @ w["trunk"]) @ w["head"]
      >>> w = {"trunk": jnp.ones((3, 8)), "head": jnp.ones((8, 4))}
      >>> found = psjax.structure.dependencies(apply, w, jnp.ones((5, 3)))
      >>> ax = psjax.structure.draw(found, title="a dense network")
      >>> dropped = psjax.structure.draw(found, keep={"trunk": False, "head": None})
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "psjax.structure.draw needs matplotlib: pip install psjax[experiments]."
        raise ImportError(msg) from error
    layers = _layers(dependencies, keep)
    if ax is None:
        height = 1.3 + 0.5 * (len(layers) + 2)
        ax = Figure(figsize=(7, height), layout="constrained").add_subplot()
    _Picture(ax, dependencies.num_classes).draw(layers)
    counts = dependencies.count(keep)
    line = f"$n$ = {_number(counts.n)},  score $n_j$ = {_number(counts.score)},  "
    line += f"element $n_{{kj}}$ = {_number(counts.element)},  common {_number(counts.common)}"
    above = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(line, (0, 1), (0, 3), **above, fontsize=8.5, color=_TEXT, annotation_clip=False)
    if title is not None:
        ax.annotate(title, (0, 1), (0, 17), **above, fontsize=11, annotation_clip=False)
    return ax


def _layers(dependencies: Dependencies, keep: Any):
    """`{name: {kind: _Part}}`, in the order of depth; a bias is in the layer of its kernel."""
    order: dict[str, int] = {}
    found: dict[str, dict[str, _Part]] = {}
    C = dependencies.num_classes
    for cells, depth in zip(dependencies.cells(keep), jax.tree.leaves(dependencies.order)):
        name = _layer(cells.path)
        order[name] = min(depth, order.get(name, depth))
        holders = cells.holds.sum(axis=0)
        owner = np.where(holders == 1, cells.holds.argmax(axis=0), 0)
        kinds = {
            "common": holders == C,
            "some": (holders > 1) & (holders < C),
            "own": holders == 1,
            "unused": holders == 0,
        }
        for kind, which in kinds.items():
            place, places = (owner, C) if kind == "own" else (0 * owner, 1)
            sums = [np.bincount(place, which * n, places) for n in (cells.sizes, cells.kept)]
            part = _Part(*sums)
            layer = found.setdefault(name, {})
            layer[kind] = layer[kind] + part if kind in layer else part
    for layer in found.values():
        for kind in [kind for kind, part in layer.items() if not part.sizes.sum()]:
            del layer[kind]
    return {
        name: found[name] for name in sorted(found, key=lambda name: order[name]) if found[name]
    }


def _layer(path: KeyPath):
    """The name of a leaf's layer: its path without the last key, unless that is all."""
    names = [keystr((key,), simple=True) for key in path]
    if len(names) > 1:
        names = names[:-1]
    if len(names) > 1 and names[0] == "params":
        names = names[1:]
    return "/".join(names)


def _number(n: float):
    return f"{int(n):,}".replace(",", "\u2009")


class _Picture:
    """Draws layers, each 1 high and C wide, upwards."""

    def __init__(self, ax: Any, num_classes: int):
        self.ax, self.C = ax, num_classes
        self.kinds: set[str] = set()
        self.colours = _COLOURS[:num_classes]
        if num_classes > len(_COLOURS):
            from matplotlib import colormaps

            self.colours = [colormaps["turbo"](i / num_classes) for i in range(num_classes)]

    def draw(self, layers: Mapping[str, Mapping[str, _Part]]):
        y = 0.0
        self._ends("input", y)
        y += 0.62
        for name, parts in layers.items():
            self._bands(y, parts)
            y += _GAP
            self._layer(y, name, parts)
            y += _ROW
        for j in range(self.C):
            self._band(j, y, self.colours[j])
        y += _GAP
        self._scores(y)
        self.ax.set(xlim=(0, self.C), ylim=(-0.05, y + 0.72))
        self.ax.axis("off")
        self._legend()

    def _box(self, x: float, y: float, width: float, height: float, colour: Any, **style: Any):
        from matplotlib.patches import Rectangle

        options: dict[str, Any] = {"zorder": 3, "facecolor": colour, "edgecolor": "white"}
        options |= {"linewidth": 0.6}
        self.ax.add_patch(Rectangle((x, y), width, height, **(options | style)))

    def _layer(self, y: float, name: str, parts: Mapping[str, _Part]):
        total = sum(part.sizes.sum() for part in parts.values())
        shares = {kind: max(part.sizes.sum() / total, _LEAST_PART) for kind, part in parts.items()}
        scale = _ROW / sum(shares.values())
        at = y
        for kind in ("unused", "common", "some", "own"):
            if kind in parts:
                self._part(at, shares[kind] * scale, kind, parts[kind])
                at += shares[kind] * scale
        kept = sum(part.kept.sum() for part in parts.values())
        middle = y + _ROW / 2
        text = {"va": "center", "color": _TEXT, "clip_on": False}
        self.ax.text(-0.012 * self.C, middle, name, ha="right", fontsize=8.5, **text)
        number = _number(total) if kept == total else f"{_number(kept)} of {_number(total)}"
        self.ax.text(1.012 * self.C, middle, number, ha="left", fontsize=8.5, **text)

    def _part(self, y: float, height: float, kind: str, part: _Part):
        """Draw blocks of one kind, with dropped weights above kept ones."""
        width = self.C / len(part.sizes)
        colours = {"common": [_COMMON], "some": [_SOME], "unused": ["white"], "own": self.colours}
        space = 0.04 if kind == "own" else 0.0
        if self.C > _MOST_LABELS:
            space = 0.0
        if part.kept.any() or kind == "unused":
            self.kinds.add(kind)
        for j, (size, kept, colour) in enumerate(zip(part.sizes, part.kept, colours[kind])):
            if not size:
                continue
            x, share = (j + space) * width, kept / size
            wide = (1 - 2 * space) * width
            edge = {"edgecolor": _EDGE} if kind == "unused" else {}
            if share:
                self._box(x, y, wide, height * share, colour, **edge)
            if share < 1:
                self.kinds.add("dropped")
                edge = colour if kind == "own" else _EDGE
                dotted = {"edgecolor": edge, "linestyle": _DOTTED, "linewidth": 1.2}
                low = y + height * share
                self._box(x, low, wide, height * (1 - share), "none", **dotted)

    def _bands(self, y: float, parts: Mapping[str, _Part]):
        """Draw bands from below to a layer: coloured to the block of each class, grey to others."""
        if "own" in parts:
            for j in np.flatnonzero(parts["own"].kept):
                self._band(j, y, self.colours[j])
        if any(parts[kind].kept.any() for kind in ("common", "some") if kind in parts):
            self._band(None, y, _COMMON)

    def _band(self, j: int | np.integer | None, y: float, colour: Any):
        inset = 0.22
        x, width = (j + inset, 1 - 2 * inset) if j is not None else (0, self.C)
        self._box(x, y, width, _GAP, colour, zorder=1, alpha=0.3, linewidth=0)

    def _ends(self, text: str, y: float):
        self._box(0, y, self.C, 0.62, "#EFEFEF", linewidth=0)
        self.ax.text(self.C / 2, y + 0.3, text, ha="center", va="center", fontsize=8.5, color=_TEXT)

    def _scores(self, y: float):
        """Draw the row of scores."""
        for j, colour in enumerate(self.colours):
            self._box(j + 0.04, y, 0.92, 0.62, colour, linewidth=0)
            if self.C <= _MOST_LABELS:
                style = {"ha": "center", "va": "center", "fontsize": 9, "color": _on(colour)}
                self.ax.text(j + 0.5, y + 0.3, f"$c_{{{j}}}$", zorder=4, **style)
        text = {"va": "center", "fontsize": 8.5, "color": _TEXT}
        self.ax.text(-0.012 * self.C, y + 0.3, "scores", ha="right", **text)
        self.ax.text(1.012 * self.C, y + 0.3, "weights", ha="left", style="italic", **text)

    def _legend(self):
        from matplotlib.legend_handler import HandlerTuple
        from matplotlib.patches import Patch

        handles: list[Any] = []
        if "own" in self.kinds:
            some = tuple(Patch(color=colour) for colour in self.colours[:3])
            handles.append((some, "one score alone depends on them"))
        if "common" in self.kinds:
            handles.append((Patch(color=_COMMON), "every score does (common)"))
        if "some" in self.kinds:
            handles.append((Patch(color=_SOME), "several do"))
        if "unused" in self.kinds:
            handles.append((Patch(facecolor="none", edgecolor=_EDGE), "none does"))
        if "dropped" in self.kinds:
            dotted = Patch(facecolor="none", edgecolor=_EDGE, linewidth=1.2, linestyle=_DOTTED)
            handles.append((dotted, "dropped"))
        self.ax.legend(
            [handle for handle, _ in handles],
            [label for _, label in handles],
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
            loc="upper center",
            bbox_to_anchor=(0.5, -0.01),
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
        )


def _on(colour: Any):
    """Black or white, whichever is easier to read on a colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
