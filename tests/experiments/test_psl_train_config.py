"""What was typed, what was saved, and what stands in a file that somebody changed."""

import dataclasses
import json
import shutil

import pytest

from experiments._lib.checkpoint import Checkpoints
from experiments._lib.command import parse
from experiments._lib.config import read_config
from experiments._lib.folder import hold_folder, open_folder
from experiments._lib.tables import read_rows
from experiments.hosts import problem
from experiments.hosts import train as hosts
from experiments.ist import run as ist_run
from experiments.ist import train as ist
from experiments.ist import training as ist_training
from experiments.psl import run, train, training

# One step an epoch.
SMALL = training.Config(compute="fused", batch_size=1437, epochs=3, learning_rate=0.01)
SMALL_IST = ist_training.Config(dataset="digits", width=8, subnets=2, epochs=2)
HOSTS = problem.Config(rounds=10, learning_rate=0.5, method="ist")


def written(folder, config):
    open_folder(config, folder, resume=False)
    return folder


# ------------------------------------------------------------------------------------------ resumed


@pytest.mark.parametrize(
    ("script", "saved", "name", "value"),
    [
        (train, SMALL, "epochs", training.Config().epochs),
        (train, SMALL, "learning_rate", training.Config().learning_rate),
        (train, dataclasses.replace(SMALL, preset="digits"), "preset", None),
        (ist, SMALL_IST, "epochs", ist_training.Config().epochs),
        (hosts, HOSTS, "rounds", problem.Config().rounds),
        (hosts, HOSTS, "learning_rate", problem.Config().learning_rate),
    ],
)
def test_an_option_that_was_typed_counts_also_where_it_is_the_default(
    script, saved, name, value, tmp_path
):
    folder = str(written(tmp_path / "run", saved))
    assert getattr(saved, name) != value
    typed = ["--resume", folder, f"--{name.replace('_', '-')}", str(value)]
    assert parse(script.Args, args=typed).config == dataclasses.replace(saved, **{name: value})
    assert parse(script.Args, args=typed[:2]).config == saved


def test_a_run_of_three_epochs_goes_on_to_the_default_number_where_it_is_asked_to(tmp_path):
    run.train(SMALL, tmp_path / "run", report=lambda line: None)
    typed = ["--resume", str(tmp_path / "run"), "--epochs", "100", "--checkpoint-every", "100"]
    train.main(parse(train.Args, args=typed))
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(1, 101))


def test_another_option_that_is_typed_is_refused_also_where_it_is_the_default(tmp_path):
    written(tmp_path / "run", SMALL)
    args = parse(train.Args, args=["--resume", str(tmp_path / "run"), "--learning-rate", "5e-3"])
    with pytest.raises(ValueError, match=r"another training \(learning_rate 0.01 there, 0.005 her"):
        train.main(args)


def test_only_a_run_is_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"nothing: no run there \(no config.json\)"):
        parse(train.Args, args=["--resume", str(tmp_path / "nothing")])


# ------------------------------------------------------------------------------------- config.json


def changed(**values):
    return json.dumps({**dataclasses.asdict(SMALL), **values})


WITHOUT_EPOCHS = {k: v for k, v in dataclasses.asdict(SMALL).items() if k != "epochs"}
WHOLE = "a whole number between -2147483648 and 2147483647"
TRUE = json.dumps({**dataclasses.asdict(SMALL_IST), "stratified": 1})
FILES = {  # what stands in the file, what is said of it
    "fraction": (changed(epochs=2.5), f'"epochs" is 2.5; it must be {WHOLE}.'),
    "whole float": (changed(epochs=3.0), f'"epochs" is 3.0; it must be {WHOLE}.'),
    "null": (changed(epochs=None), f'"epochs" is null; it must be {WHOLE}.'),
    "number as text": (changed(epochs="3"), f'"epochs" is "3"; it must be {WHOLE}.'),
    "true": (changed(seeds=True), f'"seeds" is true; it must be {WHOLE}.'),
    "list": (changed(batch_size=[20]), f'"batch_size" is [20]; it must be {WHOLE}.'),
    "object": (changed(tile={"a": 1}), f'"tile" is {{"a": 1}}; it must be {WHOLE} or null.'),
    "large": (changed(epochs=10**30), f'"epochs" is {10**30}; it must be {WHOLE}.'),
    "very large": (changed(first_seed=10**200), '"first_seed" is 1000'),
    "seed": (changed(first_seed=2**31), f'"first_seed" is 2147483648; it must be {WHOLE}.'),
    "negative": (changed(epochs=-1), "--epochs -1: write 1 or more."),
    "zero": (changed(batch_size=0), "--batch-size 0: write 1 or more."),
    "no tile": (changed(tile=0), "--tile 0: write 1 or more."),
    "negative seed": (changed(first_seed=-1), "--first-seed -1: write a number between 0 and"),
    "last seed": (changed(first_seed=2**31 - 1, seeds=2), "--first-seed 2147483647: write"),
    "text": (changed(learning_rate="fast"), '"learning_rate" is "fast"; it must be a finite numb'),
    "no rate": (changed(learning_rate=None), '"learning_rate" is null; it must be a finite numb'),
    "nan": (changed(learning_rate=float("nan")), '"learning_rate" is NaN; it must be a finite'),
    "inf": (changed(clip=float("inf")), '"clip" is Infinity; it must be a finite number or null.'),
    "1e999": (changed().replace("0.01", "1e999"), '"learning_rate" is Infinity; it must be'),
    "negative rate": (changed(learning_rate=-1.0), "--learning-rate -1.0: write 0 or more."),
    "no clip": (changed(clip=0.0), "--clip 0.0: write a number above 0."),
    "bound": (changed(margin_bound=-4.0), "--margin-bound -4.0: write a number above 0."),
    "moment": (changed(b2=1.0), "--b2 1.0: write a number from 0 on and below 1."),
    "number as choice": (changed(model=3), '"model" is 3; it must be a text.'),
    "no choice": (changed(model=None), '"model" is null; it must be a text.'),
    "near choice": (changed(model="psnets"), "--model psnets: write one of psnet, lenet. Did you"),
    "no preset": (changed(preset=["mnist"]), '"preset" is ["mnist"]; it must be a text or null.'),
    "two lines": (changed(loss="psl\nTraceback"), r"--loss 'psl\nTraceback': write one of"),
    "long": (changed(loss="a" * 10**5), "--loss aaaa"),
    "not together": (changed(loss="psl", tile=2), "--tile 2 --compute fused: write --compute elem"),
    "missing": (json.dumps(WITHOUT_EPOCHS), f'no "epochs"; it must be {WHOLE}.'),
    "unknown": (changed(epoch=3), "\"epoch\" is no option; remove it. Did you mean 'epochs'?"),
    "strange key": (changed(**{"\n": 1}), r'"\n" is no option; remove it.'),
    "nothing": ("", "it must be the JSON object that the training wrote."),
    "cut": (changed()[:40], "it must be the JSON object that the training wrote."),
    "bytes": (b"\xff\xfe\x00{", "it must be the JSON object that the training wrote."),
    "deep": ("[" * 10**5, "it must be the JSON object that the training wrote."),
    "digits": ('{"epochs": ' + "1" * 5000 + "}", "it must be the JSON object that the training"),
    "a list": ("[1, 2]", "[1, 2]; it must be the JSON object that the training wrote."),
    "a null": ("null", "null; it must be the JSON object that the training wrote."),
    "a number": ("NaN", "NaN; it must be the JSON object that the training wrote."),
}


def refused(path, command):
    """What is said of a file, which is one line and names it."""
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        command()
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert len(said) < len(str(path)) + 300
    return said


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_that_somebody_changed_is_refused_in_one_line(name, tmp_path):
    text, words = FILES[name]
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused(path, lambda: parse(train.Args, args=["--resume", str(tmp_path)]))
    assert words in said
    assert refused(path, lambda: run.train(SMALL, tmp_path, resume=True)) == said


def test_a_flag_is_true_or_false(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(TRUE)
    said = refused(path, lambda: read_config(path, ist_training.Config))
    assert said.endswith('"stratified" is 1; it must be true or false.')


def test_a_configuration_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        parse(train.Args, args=["--resume", str(tmp_path)])


@pytest.mark.parametrize("config", [SMALL, SMALL_IST, HOSTS, dataclasses.replace(SMALL, clip=1)])
def test_what_a_training_wrote_is_read_as_it_was(config, tmp_path):
    path = written(tmp_path / "run", config) / "config.json"
    assert read_config(path, type(config)) == config


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished small training, not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run.train(SMALL, folder, report=lambda line: None)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_seed": 1}, "first_seed 0 there, 1 here"),
        ({"model": "lenet"}, "model psnet there, lenet here"),
        ({"learning_rate": 0.1, "order": "fixed", "epochs": 9}, "learning_rate 0.01 there, 0.1 he"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(change, words, trained, tmp_path):
    config = dataclasses.replace(SMALL, **change)
    written(tmp_path / "run", config)
    for name in ("checkpoints", "metrics.csv"):
        copy = shutil.copytree if name == "checkpoints" else shutil.copy
        copy(trained / name, tmp_path / "run" / name)
    with pytest.raises(ValueError, match=rf"of epoch 3 .* of another training \({words}"):
        run.train(config, tmp_path / "run", resume=True, report=lambda line: None)


def test_a_checkpoint_that_carries_no_configuration_is_taken(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    state = training.build(SMALL).state
    Checkpoints(tmp_path / "run" / "checkpoints").save(3, state)
    lines = []
    run.train(SMALL, tmp_path / "run", resume=True, report=lines.append)
    assert lines == ["continuing after epoch 3."]


# --------------------------------------------------------------------------------------------- lock


@pytest.mark.parametrize(("loop", "config"), [(run, SMALL), (ist_run, SMALL_IST)])
def test_one_folder_is_trained_in_by_one_process(loop, config, tmp_path):
    folder = tmp_path / "run"
    with hold_folder(config, folder, resume=False):
        for resume in (True, False):
            with pytest.raises(OSError, match="in use by process|exists; write --resume") as found:
                loop.train(config, folder, resume=resume)
            assert "\n" not in str(found.value)
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lock"]
    with hold_folder(config, folder, resume=True):
        pass


def test_a_folder_of_other_files_gets_no_lock(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(FileExistsError, match="holds files but no run"),
        hold_folder(SMALL, tmp_path, resume=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("script", "typed", "words"),
    [
        (train, "--epochs -1", "--epochs -1: write 1 or more"),
        (train, "--first-seed -1", "--first-seed -1: write a number between 0 and 2147483647"),
        (train, "--first-seed 2147483647 --seeds 2", "write a number between 0 and 2147483646"),
        (train, "--seeds -2", "--seeds -2: write 1 or more"),
        (train, "--batch-size -5", "--batch-size -5: write 1 or more"),
        (train, "--block-size -4", "--block-size -4: write 2 or more"),
        (train, "--tile -1", "--tile -1: write 1 or more"),
        (train, "--learning-rate -1", "--learning-rate -1.0: write 0 or more"),
        (train, "--learning-rate nan", "--learning-rate nan: write 0 or more"),
        (train, "--clip -1", "--clip -1.0: write a number above 0"),
        (train, "--b2 -1", "--b2 -1.0: write a number from 0 on"),
        (train, "--checkpoint-every -1", "--checkpoint-every -1: write 1 or more"),
        (train, "--num-devices -1", "--num-devices -1: write 1 or more"),
        (ist, "--first-seed -1", "--first-seed -1: write a number between 0"),
        (ist, "--learning-rate -1", "--learning-rate -1.0: write 0 or more"),
        (ist, "--clip inf", "--clip inf: write a number above 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_the_start(script, typed, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        script.main(parse(script.Args, args=[*typed.split(), "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
