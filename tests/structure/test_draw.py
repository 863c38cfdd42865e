"""The picture of the dependencies: what stands in it, for figures 1, 3 and 5 and beyond."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import psjax
from psjax import structure
from psjax.models import PSNet
from tests.structure.test_count import DIGITS
from tests.structure.test_dependencies import of_model

SMALL = PSNet(3, (2,), 2, (2,), (3, 2), (2, 1))
COMMON = "#bdbdbd"


def blocks(ax):
    """Colours of the blocks of whole colour, by the height at which they lie."""
    found = {}
    for patch in ax.patches:
        if isinstance(patch, Rectangle) and patch.get_zorder() == 3 and patch.get_facecolor()[3]:
            found.setdefault(round(patch.get_y(), 3), []).append(to_hex(patch.get_facecolor()))
    return [found[y] for y in sorted(found)]


def words(ax):
    legend = ax.get_legend().get_texts()
    return [text.get_text().replace("\u2009", "") for text in [*ax.texts, *legend]]


def test_a_layer_is_a_block_of_all_columns_or_one_of_each_class_and_its_bias_is_in_it():
    """Figure 3: from the input upwards the trunk, four layers of the classes, the scores."""
    found = of_model(SMALL, DIGITS)[2]
    _, trunk, *own = blocks(structure.draw(found))
    assert trunk == [COMMON]
    assert [len(set(row)) for row in own] == [3] * 4
    assert len({tuple(row) for row in own}) == 1  # a class has one colour
    sizes = {"Conv_0": 20, "FanOutConv_0": 54, "SeparableDense_0": 3 * 2 * (8 + 1)}
    shown = words(structure.draw(found, title="PSNet"))
    assert {"PSNet", "input", "scores", *sizes} <= set(shown)
    assert {"20", "54"} <= set(shown)


def test_layers_stand_in_the_order_in_which_the_program_reads_them():
    def apply(w, x):
        return jnp.tanh(jnp.tanh(x @ w["z"]["kernel"] + w["z"]["bias"]) @ w["m"]) @ w["a"]

    w = {"z": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "m": np.ones((3, 3))}
    w["a"] = np.ones((3, 4))
    ax = structure.draw(structure.dependencies(apply, w, np.ones((5, 2))))
    names = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert names["input"] < names["z"] < names["m"] < names["a"] < names["scores"]
    assert names["9"] in (names["z"], names["m"])


def test_dropped_weights_are_dotted_and_the_counts_are_of_what_remains():
    """Figure 5: without the trunk no weight is common."""
    _, like, found = of_model(SMALL, DIGITS)
    keep = psjax.dropout_mask(jax.random.key(0), like, layers={"Conv_0": 1.0})
    ax = structure.draw(found, keep=keep)
    assert COMMON not in sum(blocks(ax), [])
    assert {"dropped", "0 of 20"} <= set(words(ax))
    assert any("common 0" in text for text in words(ax))
    dotted = [p for p in ax.patches if not p.get_facecolor()[3] and p.get_width() == 3]
    assert len(dotted) == 1


def test_of_a_layer_with_half_its_weights_dropped_half_is_drawn():
    apply = lambda w, x: x @ w
    keep = np.array([[True, True, False]] * 2 + [[True, False, False]] * 2)
    ax = structure.draw(structure.dependencies(apply, np.ones((4, 3)), np.ones((2, 4))), keep=keep)
    rows = [
        p for p in ax.patches if p.get_zorder() == 3 and p.get_y() >= 1 and p.get_width() < 0.95
    ]
    kept = [p.get_height() for p in rows if p.get_facecolor()[3]][:2]
    assert kept[0] == 2 * kept[1] > 0


def test_what_several_scores_or_none_depend_on_is_told_apart():
    def apply(w, x):
        pair = x * w["pair"].sum()
        return jnp.stack([pair * w["own"][0], pair, x * w["own"][1], x], axis=-1) + w["all"]

    w = {"pair": jnp.ones(2), "own": jnp.ones(2), "all": jnp.ones(()), "unused": jnp.ones(3)}
    found = structure.dependencies(apply, w, jnp.ones(5))
    assert found.counts == structure.WeightCounts(n=8, score=4, element=5, common=1)
    labels = words(structure.draw(found))
    assert labels[-4:] == [
        "one score alone depends on them",
        "every score does (common)",
        "several do",
        "none does",
    ]


def test_a_hundred_classes_have_a_picture_on_axes_that_are_given(tmp_path):
    apply = lambda w, x: jnp.tanh(x @ w["trunk"]) @ w["head"]
    w = {"trunk": np.ones((3, 8)), "head": np.ones((8, 100))}
    figure = Figure(figsize=(7, 3), layout="constrained")
    ax = figure.add_subplot()
    assert structure.draw(structure.dependencies(apply, w, np.ones((5, 3))), ax) is ax
    figure.savefig(tmp_path / "many.png")
    assert len(set(blocks(ax)[2])) == 100


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = structure.dependencies(lambda w, x: x * w, jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(ImportError, match=r"pip install psjax\[experiments\]"):
        structure.draw(found)
