"""Very many labels as a user trains them: Table 2 on a tiny set, Amazon's shapes in small."""

import csv
import dataclasses
import functools
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import linen as nn

import psjax
from experiments._lib.loop import NotFiniteError
from experiments._lib.tables import read_rows, write_rows
from experiments.ist import amazon, extreme, sparse, training


def tiny(num_points, seed):
    """Points whose one label is told by their features, among noise."""
    data = amazon.synthetic(num_points, 40, 12, features_a_point=6, labels_a_point=1, seed=seed)
    labels = (data.indices[data.indptr[:-1]] % 12).astype(np.int32)
    return data._replace(label_indptr=np.arange(num_points + 1), label_indices=labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as the repository has them."""
    folder = tmp_path_factory.mktemp("xc") / "Tiny"
    folder.mkdir()
    psjax.data.write_xc(folder / "train.txt", tiny(100, seed=0))
    psjax.data.write_xc(folder / "test.txt", tiny(30, seed=1))
    return folder


def small(folder, tmp_path, **kwargs):
    options = {
        "width": 8,
        "subnets": 2,
        "local_steps": 2,
        "batch_size": 8,
        "learning_rates": (0.03,),
        "epochs": 3,
        "seeds": 2,
        "validation_seeds": 1,
        "out": tmp_path / "results",
        "runs": tmp_path / "runs",
    }
    return extreme.Args(data=folder, **{**options, **kwargs})


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------ Table 2


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    args = small(folder, path)
    return args, extreme.table_2(args)


def test_every_method_trains_and_is_measured_each_epoch(trained):
    args, chosen = trained
    rows = table(args.out / "tiny.csv")
    assert [c.name for c in chosen] == ["data parallel", "IST", "IST twice as wide"]
    assert [(c.config.width, c.config.subnets) for c in chosen] == [(8, 2), (8, 2), (16, 4)]
    assert set(extreme.METRICS) < set(rows[0])
    for c in chosen:
        own = [row for row in rows if row["setting"] == c.name and row["part"] == "test"]
        seen = {(row["seed"], row["epoch"]) for row in own}
        assert seen == {(seed, epoch) for seed in "01" for epoch in "123"}
        assert len(c.rows) == args.seeds
        assert all(0 <= float(row[m]) <= 1 for row in own for m in extreme.METRICS)
        assert all(math.isfinite(float(row["train_loss"])) for row in own)
        tried = [row for row in rows if (row["setting"], row["part"]) == (c.name, "validation")]
        assert {row["epoch"] for row in tried} == {"1", "2", "3"}


def test_the_table_says_how_it_was_chosen_and_that_the_papers_numbers_are_of_another_set(trained):
    args, _ = trained
    text = (args.out / "tiny.md").read_text()
    assert "Nothing was chosen on the test set" in text
    assert "another data set" in text
    assert "40.89" in text
    assert text.count(" ± ") >= 3 * 8


def test_the_command_draws_what_it_measured_and_again_from_the_rows_alone(
    trained, tmp_path, monkeypatch
):
    args, chosen = trained
    extreme.main(args)  # all is trained
    picture = args.out / "tiny.png"
    assert picture.stat().st_size < 100_000
    drawn = {}
    monkeypatch.setattr(extreme.figures, "table2", lambda path, lines, title: drawn.update(lines))
    monkeypatch.setattr(extreme, "table_2", None)
    shutil.copy(args.out / "tiny.csv", tmp_path)
    extreme.main(extreme.Args(data=pathlib.Path(args.data.name), plot=True, out=tmp_path))
    assert list(drawn) == [c.name for c in chosen]
    assert drawn["IST"]["label"] == "IST, 8 neurons, 2 subnets"
    for c in chosen:
        line = drawn[c.name]
        assert line["epoch"] == c.epoch
        own = [row["P@1"] for row in line["rows"] if row["epoch"] == c.epoch]
        assert own == [row["P@1"] for row in c.rows]


def test_the_committed_rows_are_drawn_and_the_picture_is_small(tmp_path):
    shutil.copy(extreme.RESULTS / "bibtex.csv", tmp_path)
    extreme.main(extreme.Args(plot=True, out=tmp_path))
    sizes = [(folder / "bibtex.png").stat().st_size for folder in (tmp_path, extreme.RESULTS)]
    assert max(sizes) < 100_000


def test_a_training_that_goes_on_is_drawn_as_far_as_it_is(tmp_path):
    def row(part, epoch, p):
        return {
            "setting": "IST",
            "part": part,
            "width": 8,
            "subnets": 2,
            "learning_rate": 0.03,
            "epoch": epoch,
            "seed": 0,
            "P@1": p,
        }

    rows = [row("validation", 1, 0.2), row("validation", 2, 0.3), row("test", 1, 0.2)]
    write_rows(tmp_path / "tiny.csv", rows)
    assert extreme.draw(tmp_path, "Tiny").stat().st_size


def test_drawing_without_rows_says_what_to_do(trained, tmp_path):
    args, _ = trained
    with pytest.raises(FileNotFoundError, match=r"bibtex\.csv: no such file; train with --data"):
        extreme.main(extreme.Args(plot=True, out=tmp_path))
    lines = (args.out / "tiny.csv").read_text().splitlines(keepends=True)
    (tmp_path / "tiny.csv").write_text("".join(x for x in lines if ",test," not in x))
    with pytest.raises(ValueError, match=r"tiny\.csv: no rows of the test set; continue with"):
        extreme.draw(tmp_path, "Tiny")


def test_a_second_run_trains_nothing_and_writes_the_same(trained, monkeypatch):
    args, chosen = trained
    before = {path: path.read_bytes() for path in args.out.iterdir()}
    monkeypatch.setattr(extreme, "round_fn", None)
    again = extreme.table_2(args)
    assert [c.rows for c in again] == [c.rows for c in chosen]
    assert before == {path: path.read_bytes() for path in args.out.iterdir()}


def test_an_interrupted_run_continues_to_the_same_end(trained, folder, tmp_path):
    args, chosen = trained
    whole, test = sparse.load(folder)

    def stop(rows):  # after the second epoch's row, before its checkpoint
        if rows[-1]["epoch"] == 2:
            raise KeyboardInterrupt

    run = functools.partial(extreme.train, chosen[1].config, whole, test, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run(stop, checkpoint_every=1)
    timeless = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    straight = read_rows(args.runs / "Tiny-ist-8x2-J2-adam-0.03-test" / "metrics.csv")
    assert timeless(run()) == timeless(straight)


def test_a_run_folder_of_a_longer_training_is_refused(trained):
    args, _ = trained
    with pytest.raises(ValueError, match="has 3 epochs; write --epochs 3 or more"):
        extreme.table_2(dataclasses.replace(args, epochs=2))


def test_training_learns_the_labels(folder, tmp_path):
    whole, test = sparse.load(folder)
    config = extreme.settings(small(folder, tmp_path, epochs=60, seeds=1), "tiny")["IST"]
    config = dataclasses.replace(config, learning_rate=0.03, width=32)
    rows = extreme.train(config, whole, whole, tmp_path / "run", checkpoint_every=60)
    assert rows[-1]["P@1"] > 0.8 > 0.6 > rows[0]["P@1"]


def test_the_validation_part_is_a_fifth_of_the_training_set_and_the_rest_is_the_rest(folder):
    whole, _ = sparse.load(folder)
    part, validation = sparse.divide(whole)
    assert (len(part), len(validation)) == (80, 20)
    rows = lambda data: {row.tobytes() for row in data.arrays["values"]}
    assert rows(part) | rows(validation) == rows(whole)
    assert not rows(part) & rows(validation)


def test_the_first_epoch_with_the_best_mean_is_chosen():
    rows = [(1, 0.2), (1, 0.4), (2, 0.5), (2, 0.3), (3, 0.4), (3, 0.4)]
    rows = [{"epoch": epoch, "P@1": p} for epoch, p in rows]
    assert extreme.best_epoch(rows) == (pytest.approx(0.4), 2)


def test_rate_and_epoch_are_those_of_the_validation_part_and_not_of_the_test_set(
    folder, tmp_path, monkeypatch
):
    seen = []

    def train(config, train, held_out, folder, written):
        seen.append((config.part, config.learning_rate, len(train), len(held_out)))
        good = 2 if config.part == "validation" else 4  # where it is best
        gain = 0 if config.learning_rate == 0.2 else 0.1
        return [
            {
                "epoch": e,
                "seed": 0,
                **dict.fromkeys(extreme.METRICS, 0.5 - gain - abs(e - good) / 20),
            }
            for e in (1, 2, 3, 4)
        ]

    monkeypatch.setattr(extreme, "train", train)
    rates = 0.1, 0.2, 0.3
    chosen = extreme.table_2(small(folder, tmp_path, learning_rates=rates, epochs=4, local_steps=1))
    assert seen == 3 * [*(("validation", rate, 80, 20) for rate in rates), ("test", 0.2, 100, 30)]
    assert [(c.config.learning_rate, c.epoch) for c in chosen] == 3 * [(0.2, 2)]
    assert chosen[0].rows[0]["P@1"] == pytest.approx(0.4)


def test_learning_rates_that_diverge_are_left_out_and_all_of_them_are_an_error(folder, tmp_path):
    args = small(folder, tmp_path, optimizer="sgd", learning_rates=(1e38,), epochs=1, seeds=1)
    with pytest.raises(NotFiniteError, match="data parallel: NaN or Inf with every learning rate"):
        extreme.table_2(args)


def test_missing_and_damaged_data_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no train\.txt there.*XMLRepository"):
        extreme.table_2(small(tmp_path / "nowhere", tmp_path))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("train.txt", "test.txt"):
        (damaged / name).write_bytes((folder / name).read_bytes())
    text = (folder / "test.txt").read_bytes()
    (damaged / "test.txt").write_bytes(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"test\.txt.*line \d+ is cut off"):
        extreme.table_2(small(damaged, tmp_path))
    psjax.data.write_xc(damaged / "test.txt", amazon.synthetic(9, 30, 12, 3, 2))
    with pytest.raises(ValueError, match="must be of one data set"):
        extreme.table_2(small(damaged, tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data FOLDER, of train.txt and test.txt, or --amazon-shapes"),
        (["--amazon-shapes", "--data", "x"], "--data FOLDER"),
        (["--amazon-shapes", "--plot"], "a round has no curve; write --plot alone"),
        (["--amazon-shapes", "--optimizer", "adamm"], "--optimizer adamm: write one of sgd"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(extreme.Args, args=options)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


# --------------------------------------------------------------------------------- Amazon's shapes


def test_a_round_of_the_shapes_in_small_is_measured_and_added_to_the_table(tmp_path):
    old = dict.fromkeys(amazon.COLUMNS, 7.0) | {"subnets": 4, "local_steps": 2}
    olds = [{**old, "hidden": hidden, "batch_size": 4} for hidden in (16, 32)]
    write_rows(tmp_path / "amazon_shapes.csv", olds)
    args = extreme.Args(amazon_shapes=True, width=16, subnets=4, batch_size=4, out=tmp_path)
    config = training.Config(**args.options, learning_rate=args.learning_rates[0])
    row = amazon.one_round(config, tmp_path, 300, 500)
    assert row["loss"] == pytest.approx(math.log(500), rel=0.1)
    rows = table(tmp_path / "amazon_shapes.csv")
    assert [row["hidden"] for row in rows] == ["16", "32"]
    assert float(rows[0]["weights_gib"]) * 2**30 == pytest.approx(4 * 16 * 802 + 4 * 500, rel=1e-4)
    assert all(float(x) > 0 for row in rows for x in row.values())
    assert "| 16 | 4 × 2 × 4 |" in (tmp_path / "amazon_shapes.md").read_text()


def test_a_round_holds_little_more_than_the_weights_twice():
    """Of large weights: the old ones, donated; the subnets'; one subnet's gradient."""
    args = {"subnets": 8, "local_steps": 2, "batch_size": 4, "learning_rate": 0.1}
    config = training.Config(width=128, **args)
    rows = sparse.padded(amazon.synthetic(64, 4000, 50_000, 5, 2))
    net = sparse.make_model(rows, 128)
    weights = amazon.gib(sparse.shapes_of(net)[1])
    assert amazon.needs(amazon.compiled_round(config, net, rows.arrays)) < 2.6 * weights
    alone = dataclasses.replace(config, method="data-parallel", subnets=1)
    subnet = amazon.compiled_round(alone, net.subnet(8), rows.arrays)
    assert amazon.needs(subnet) < 0.4 * weights


def test_synthetic_points_have_the_statistics_they_are_asked_for():
    data = amazon.synthetic(3000, 2000, 1000, features_a_point=30, labels_a_point=5.45)
    assert np.diff(data.indptr).mean() == pytest.approx(30, rel=0.02)
    assert np.diff(data.label_indptr).mean() == pytest.approx(5.45, rel=0.02)
    norms = np.sqrt(np.add.reduceat(data.values**2, data.indptr[:-1]))
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert (data.values > 0).all()
    counts = -np.sort(-np.bincount(data.label_indices, minlength=1000))
    slope = np.polyfit(np.log(np.arange(10, 500)), np.log(counts[10:500]), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    ends = data.indptr[:-1], data.indptr[1:]
    assert all(len(set(data.indices[a:b])) == b - a for a, b in zip(*ends))


def test_initial_weights_drawn_in_blocks_are_distributed_as_the_networks_own():
    net = psjax.models.SparseMLP(3000, 2000, (512,))
    row = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1))
    own = nn.unbox(net.init(jax.random.key(0), *row))["params"]
    drawn = amazon.initial_params(net, jax.random.key(1))
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert all(jax.tree.leaves(jax.tree.map(same, own, drawn)))
    for name in ("embedding", "kernel"):
        a, b = (np.sort(np.ravel(tree[name])) for tree in (own, drawn))
        assert len(np.unique(b)) > 0.6 * len(b)
        np.testing.assert_allclose(b[::5000], a[::5000], atol=0.02 * a.max())
    np.testing.assert_array_equal(drawn["norm"]["scale"], 1)
