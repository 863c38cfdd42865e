"""Tables 1 and 3 of the IST paper: settings run and continued, tables and figures from them."""

import csv
import dataclasses

import numpy as np
import pytest

from experiments.ist import reproduce, run, tables

STEPS = [
    {**size._asdict(), "workers": n, "seconds": 1e-2 / n}
    for size in (tables.Size(2, 16, 10), tables.Size(3, 16, 10))
    for n in (1, 2, 4, 8)
]


def small(folder, *only, **kwargs):
    return reproduce.Args(
        only=only,
        seeds=2,
        epochs=2,
        width=16,
        dataset="digits",
        out=folder / "runs",
        results=folder / "results",
        **kwargs,
    )


def test_settings_run_once_and_become_tables_and_figures(tmp_path, capsys, monkeypatch):
    args = small(tmp_path, "2layer-ist-n2-J10", "2layer-data-parallel-n1-J1")
    reproduce.main(args)
    results = args.results
    with open(results / tables.STEPS_FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, STEPS[0])
        writer.writeheader()
        writer.writerows(STEPS)
    (tmp_path / "README.md").write_text(
        "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("table3", "table1", "steps"))
    )
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("done before"))
    reproduce.main(args)
    monkeypatch.setattr(tables, "SIZES", (tables.Size(2, 16, 10), tables.Size(3, 16, 10)))
    for _ in range(2):
        reproduce.main(dataclasses.replace(args, only=(), plot=True))
        readme = (tmp_path / "README.md").read_text()
        assert readme.count("| IST, statistics that travelled") == 1
        assert readme.count("<!-- /table1 -->") == 1
    assert "| data parallel |" in (results / "table3.md").read_text()
    assert "(0.63)" in (results / "table1.md").read_text()
    for number in (3, 4):
        assert 1000 < (results / f"figure{number}.png").stat().st_size < 200_000


def test_the_statistics_that_travel_change_no_weight(tmp_path):
    args = small(tmp_path)
    config = reproduce.config_of(reproduce.SETTINGS["3layer-ist-n2-J10"], args)
    assert config.normalization == "travelling"
    plain = dataclasses.replace(config, normalization="batch")
    one, other = (
        run.train(c, tmp_path / c.normalization, report=lambda line: None) for c in (config, plain)
    )
    for column in ("train_loss", "test_accuracy"):
        found, want = ([row[column] for row in rows] for rows in (one, other))
        # Two programs: XLA rounds the same sums differently, by one unit of float32 here.
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_a_training_stops_when_its_loss_stands_still(tmp_path):
    assert not reproduce.loss_stands_still([{"epoch": 1, "train_loss": 1.0}], 1)
    rows = [
        {"epoch": e, "train_loss": loss + s, "seed": s}
        for e, loss in enumerate((3.0, 1.0, 2.0, 1.5))
        for s in (0, 1)
    ]
    assert reproduce.loss_stands_still(rows, 2)
    assert not reproduce.loss_stands_still(rows, 3)
    config = reproduce.config_of(reproduce.SETTINGS["2layer-ist-n2-J10"], small(tmp_path))
    config = dataclasses.replace(config, epochs=40)
    rows = run.train(
        config, tmp_path / "run", stop=lambda rows: len(rows) >= 4, report=lambda line: None
    )
    assert len(rows) == 4


def test_samples_to_an_accuracy_and_the_time_of_a_step():
    rows = [
        {"epoch": e, "seed": s, "samples": 100 * e, "test_accuracy": 0.1 * e + 0.2 * s}
        for e in (1, 2, 3)
        for s in (0, 1)
    ]
    samples, seeds = tables.samples_to(rows, 0.3)
    np.testing.assert_array_equal(np.sort(samples), [100, 300])
    assert seeds == 2
    assert len(tables.samples_to(rows, 0.5)[0]) == 1
    times = tables.Times(STEPS)
    size = tables.Size(2, 16, 10)
    weights = 4096 * 16 + 16 * 10 + 32
    assert tables.sent(size, "data-parallel", 4, 1) == 4 * 2 * 3 * weights
    assert tables.sent(size, "ist", 4, 10) == pytest.approx(4 * 2 * 3 / 4 * weights / 10)
    assert times.network(size, "local-sgd", 2, 10) == pytest.approx(4 * weights / 10 / 125e6)
    assert times.speedup(size, "ist", 2, 10, wired=False) == pytest.approx(4)


def test_a_wrong_setting_is_named():
    with pytest.raises(ValueError, match="--only 2layer-its.*write some of steps, 2layer-data"):
        reproduce.chosen(("2layer-its",))
    assert reproduce.chosen(("steps", "*-n1-*")) == [
        "steps",
        "2layer-data-parallel-n1-J1",
        "3layer-data-parallel-n1-J1",
    ]
