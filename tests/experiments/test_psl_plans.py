"""The command that chooses a plan: its table, its list of workers and its picture."""

import numpy as np
from PIL import Image

import psjax
from experiments.psl import plans


def test_the_command_prints_the_table_and_who_does_what_and_draws_it(tmp_path, capsys):
    path = tmp_path / "plan.png"
    plan = plans.main(plans.Args(preset="digits", slots=20, picture=path))
    lines = capsys.readouterr().out.splitlines()
    assert sum("(chosen)" in line for line in lines) == 1
    assert any("20 slots" in line for line in lines)
    workers = [line.split(":")[0] for line in lines if line.startswith("worker ")]
    assert workers == [f"worker {w}" for w in range(8)]
    assert plan.num_classes == 10
    with Image.open(path) as image:
        assert image.size[0] == 1200


def test_a_plan_of_many_classes_in_turns_has_a_picture(tmp_path):
    plans.draw(psjax.plan.cyclic(24, 4, 24), tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert len(np.unique(np.asarray(image))) > 4  # a colour a worker
