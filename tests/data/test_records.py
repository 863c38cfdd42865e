"""A damaged set of TensorFlow Datasets is an error of one line, with the file and what to do."""

import io
import json
import shutil

import numpy as np
import pytest

from psjax import data

SHARDS = {"train": [5], "test": [3, 4]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What TFDS writes of MNIST, with these numbers of images, each of its label's colour."""
    from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    folder = tmp_path_factory.mktemp("tfds") / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    splits = []
    for split, lengths in SHARDS.items():
        for i, length in enumerate(lengths):
            name = f"mnist-{split}.array_record-{i:05d}-of-{len(lengths):05d}"
            writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            for label in range(length):
                png = io.BytesIO()
                Image.fromarray(np.full((28, 28), label, np.uint8)).save(png, "png")
                example = tf_example_pb2.Example()  # pyright: ignore
                example.features.feature["image"].bytes_list.value.append(png.getvalue())
                example.features.feature["label"].int64_list.value.append(label)
                writer.write(example.SerializeToString())
            writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        splits.append({"name": split, "filepathTemplate": template, "numBytes": "1"})
        splits[-1]["shardLengths"] = [str(n) for n in lengths]
    info = {"name": "mnist", "version": "3.0.1", "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder.parent.parent


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path / "mnist" / "3.0.1"


def load(folder, split="test"):
    return data.load("mnist", split, data_dir=str(folder.parent.parent))


def test_records_come_shard_by_shard(folder):
    got = load(folder)
    assert got.labels.tolist() == [0, 1, 2, 0, 1, 2, 3]
    np.testing.assert_array_equal(
        got.images, np.broadcast_to(got.labels[:, None, None, None], (7, 28, 28, 1))
    )
    assert load(folder, "train").labels.tolist() == [0, 1, 2, 3, 4]


def cut(file, share):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])


def flip(file, at):
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1
    file.write_bytes(whole)


def in_info(file, change):
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def as_folder(file):
    file.unlink()
    file.mkdir()


SHARD, INFO = "mnist-test.array_record-00001-of-00002", "dataset_info.json"
DAMAGES = {
    "shard missing": (SHARD, lambda f: f.unlink(), "is missing"),
    "shard empty": (SHARD, lambda f: f.write_bytes(b""), "cannot be read"),
    "shard cut": (SHARD, lambda f: cut(f, 0.5), "cannot be read"),
    "shard cut by one byte": (
        SHARD,
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        "cannot be read",
    ),
    "shard is text": (SHARD, lambda f: f.write_text("hello\n" * 20000), "cannot be read"),
    "shard with a wrong bit": (SHARD, lambda f: flip(f, 64 + 40 + 20), "cannot be read"),
    "shard is a folder": (SHARD, as_folder, "cannot be read"),
    "shard of another": (
        SHARD,
        lambda f: shutil.copy(f.with_name("mnist-train.array_record-00000-of-00001"), f),
        "has 5 records, but dataset_info.json says 4",
    ),
    "info empty": (INFO, lambda f: f.write_bytes(b""), "cannot be read"),
    "info cut": (INFO, lambda f: cut(f, 0.5), "cannot be read"),
    "info of other bytes": (INFO, lambda f: f.write_bytes(bytes(range(256))), "cannot be read"),
    "info {}": (INFO, lambda f: f.write_text("{}"), "cannot be read"),
    "info null": (INFO, lambda f: f.write_text("null"), "cannot be read"),
    "info is a folder": (INFO, as_folder, "cannot be read"),
    "info of an unknown field": (INFO, lambda f: in_info(f, lambda i: i.update(x=1)), "cannot be"),
    "info of an unknown format": (
        INFO,
        lambda f: in_info(f, lambda i: i.update(fileFormat="x")),
        "cannot be read",
    ),
    "info of another version": (
        INFO,
        lambda f: in_info(f, lambda i: i.update(version="9.9.9")),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_with_its_file_and_the_cure(damage, folder):
    name, break_, says = DAMAGES[damage]
    break_(folder / name)
    error = FileNotFoundError if says == "is missing" else ValueError
    with pytest.raises(error) as caught:
        load(folder)
    said = str(caught.value)
    assert said.startswith("load('mnist', split='test'): "), said
    assert str(folder / name) in said
    assert says in said
    assert "prepare the set again. With network" in said
    assert "\n" not in said


UNPREPARED = {
    "no info": lambda info: info.unlink(),
    "no splits": lambda info: in_info(info, lambda i: i.pop("splits")),
    "no shards": lambda info: in_info(info, lambda i: i["splits"][1].pop("shardLengths")),
    "tfrecord": lambda info: in_info(info, lambda i: i.update(fileFormat="tfrecord")),
}


@pytest.mark.parametrize("what", UNPREPARED)
def test_what_is_not_prepared_says_how_to(what, folder):
    UNPREPARED[what](folder / INFO)
    with pytest.raises(FileNotFoundError, match=r"not prepared as array_record.*download_and_prep"):
        load(folder)


def test_records_that_are_no_images_are_named(folder):
    """Whole files, the records of which are something else."""
    from array_record.python.array_record_module import ArrayRecordWriter  # pyright: ignore

    writer = ArrayRecordWriter(str(folder / SHARD), "group_size:1")
    for _ in range(4):
        writer.write(b"not a message")
    writer.close()
    with pytest.raises(ValueError, match="does not have the features of the set") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_file_that_a_split_does_not_need_may_be_damaged(folder):
    (folder / SHARD).unlink()
    assert load(folder, "train").labels.size == 5
