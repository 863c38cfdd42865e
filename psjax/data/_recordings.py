"""Two sources of spoken words: sets prepared by TensorFlow Datasets, and folders of wav files.

Each has `sample_rate`, `num_classes`, `fingerprint` (a hash of its files), `len` and `read`.
"""

import functools
import hashlib
import json
import pathlib
import re
import wave
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psjax.data import _records

WORDS: tuple[str, ...] = tuple(
    "backward bed bird cat dog down eight five follow forward four go happy house learn left "
    "marvin nine no off on one right seven sheila six stop three tree two up visual wow yes zero"
    "".split()
)


class Records:
    """Recordings that TFDS has prepared.

    The reader of TFDS needs TensorFlow for an Audio feature. The records are plain
    `tf.train.Example` messages in array_record files, and TFDS contains the message class.
    """

    def __init__(self, call: str, name: str, data_dir: str | None, split: str):
        try:
            from array_record.python import array_record_data_source
            from tensorflow_datasets.proto import tf_example_pb2
        except ImportError as error:
            msg = f"{call} needs tensorflow-datasets and array_record: pip install "
            msg += "'psjax[data]'."
            raise ImportError(msg) from error
        messages: Any = tf_example_pb2
        self._parse = messages.Example.FromString
        self._call = call
        folder = _records.folder_of(name, data_dir)
        cure = _records.how_to_prepare(name, data_dir, "TensorFlow and pydub")
        versions = [
            f.parent
            for f in folder.glob("*/dataset_info.json")
            if re.fullmatch(r"\d+(\.\d+)*", f.parent.name)
        ]
        if not versions:
            raise _records.unprepared(call, folder, cure)
        version = max(versions, key=lambda f: [int(n) for n in f.name.split(".")])
        stored = "train" if name == "spoken_digit" else split
        try:
            info = json.loads((version / "dataset_info.json").read_text())
            features = json.loads((version / "features.json").read_text())
            features = features["featuresDict"]["features"]
            self.sample_rate = int(features["audio"]["audio"]["sampleRate"])
            self.num_classes = int(features["label"]["classLabel"]["numClasses"])
            sizes = {s["name"]: s["shardLengths"] for s in info["splits"]}[stored]
            sizes = [int(n) for n in sizes]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _records.unreadable(call, version, error, cure) from error
        names = [
            f"{name}-{stored}.array_record-{i:05d}-of-{len(sizes):05d}" for i in range(len(sizes))
        ]
        files = [version / n for n in names]
        self._shards = _records.Shards(call, version, dict(zip(files, sizes)), cure)
        self._shards.check()
        self.fingerprint = [version.name, sizes, _digest(files)]
        self._source = array_record_data_source.ArrayRecordDataSource([str(f) for f in files])
        self._name, self._split = name, split

    @functools.cached_property
    def _rows(self):
        """The records of the split; all records must be read to find them."""
        rows = range(len(self._source))
        if self._name != "spoken_digit":
            return rows
        names = self._get(rows, lambda x: x["audio/filename"].bytes_list.value[0].decode())
        return [row for row in rows if self._is_test(names[row]) == (self._split == "test")]

    def _is_test(self, name: str):
        match = re.fullmatch(r"\d_[a-z]+_(\d+)\.wav", name)
        if not match:
            msg = f"{self._call}: file name {name!r} is not 'digit_speaker_index.wav'."
            raise ValueError(msg)
        return int(match[1]) < 5

    def _get(self, rows: Sequence[int], part: Callable[..., Any]):
        """One part of the features of each of these records."""
        try:
            records = self._source.__getitems__(list(rows))
            return [part(self._parse(record).features.feature) for record in records]
        except Exception as error:  # of array_record, of the message or of the part
            raise self._shards.blame(error) from error

    def __len__(self):
        return len(self._rows)

    def read(self, places: Sequence[int]):
        """Waveforms and labels."""
        rows = [self._rows[i] for i in places]
        waveform = lambda x: np.array(x["audio"].int64_list.value, np.float32)
        part = lambda x: (waveform(x), x["label"].int64_list.value[0])
        read = self._get(rows, part)
        for row, (x, label) in zip(rows, read):
            if not 0 <= label < self.num_classes:
                msg = f"{self._call}: label {label} is outside [0, {self.num_classes})."
                raise ValueError(msg)
            if not len(x):
                msg = f"{self._call}: record {row}, counted from 0, has no samples."
                raise ValueError(msg)
        return read


class Folders:
    """The unpacked archive of Speech Commands, with one folder of wav files per word."""

    sample_rate = 16000
    num_classes = len(WORDS)

    def __init__(self, call: str, data_dir: str | None, split: str, split_by: str):
        self._call = call
        folder = Path(data_dir or ".").expanduser()
        missing = [word for word in WORDS if not (folder / word).is_dir()]
        lists = {s: folder / f"{s}_list.txt" for s in ("validation", "testing")}
        missing += [f.name for f in lists.values() if split_by == "official" and not f.is_file()]
        if missing:
            msg = (
                f"{call}: {missing[0]!r} and {len(missing) - 1} others of the 35 words and two "
                f"lists are not in {folder}. Unpack http://download.tensorflow.org/data/"
                "speech_commands_v0.02.tar.gz, and pass data_dir=its folder."
            )
            raise FileNotFoundError(msg)
        names = [
            f"{word}/{f.name}" for word in WORDS for f in sorted((folder / word).glob("*.wav"))
        ]
        if split_by == "hash":
            self._names = [n for n in names if _in_a_fifth(n) == (split == "test")]
        else:
            validation, testing = (f.read_text().split() for f in lists.values())
            lost = sorted({*validation, *testing} - set(names))
            if lost:
                msg = f"{call}: {lost[0]!r} and {len(lost) - 1} others of the lists are not there."
                raise FileNotFoundError(msg)
            wanted = {"validation": set(validation), "test": set(testing)}
            wanted["train"] = set(names) - wanted["validation"] - wanted["test"]
            self._names = [n for n in names if n in wanted[split]]
        self._folder = folder
        try:
            self.fingerprint = [self._names, _digest(folder / n for n in self._names)]
        except OSError as error:
            msg = f"{call}: {error.filename} cannot be read ({error.strerror})."
            raise ValueError(msg) from error

    def __len__(self):
        return len(self._names)

    def read(self, places: Sequence[int]):
        """Waveforms and labels."""
        return [
            (self._wav(n), WORDS.index(n.split("/")[0]))
            for n in map(self._names.__getitem__, places)
        ]

    def _wav(self, name: str):
        try:
            with wave.open(str(self._folder / name), "rb") as file:
                kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
                count = file.getnframes()
                samples = file.readframes(count)
        except (wave.Error, EOFError) as error:
            msg = f"{self._call}: {name} is not a wav file ({error})."
            raise ValueError(msg) from error
        if kind != (1, 2, self.sample_rate) or not samples or len(samples) % 2:
            msg = (
                f"{self._call}: {name} has {kind[0]} channels of {8 * kind[1]} bits at {kind[2]} "
                f"Hz and {len(samples)} bytes; it must have 1 of 16 bits at {self.sample_rate} "
                "Hz, and samples."
            )
            raise ValueError(msg)
        if len(samples) != 2 * count:
            msg = (
                f"{self._call}: {name} is cut off: it has {len(samples) // 2} of the {count} "
                "samples that its header says. Unpack the archive again."
            )
            raise ValueError(msg)
        return np.frombuffer(samples, "<i2").astype(np.float32)


def _in_a_fifth(name: str):
    """The rule of the archive's README for 20 %: it keeps all recordings of a speaker together."""
    speaker = re.sub(r"_nohash_.*$", "", name.split("/")[-1])
    number = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 2**27
    return number * 100 / (2**27 - 1) < 20


def _digest(files: Iterable[pathlib.Path]):
    """A hash of the contents of the files, in order."""
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
