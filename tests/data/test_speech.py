"""The features are the formula's, the splits are disjoint, and the cache changes nothing."""

import hashlib
import json
import math
import os
import pathlib
import wave

import jax
import numpy as np
import pytest

from psjax import data
from psjax.data import _recordings, _speech

SMALL = data.LogMel(num_mels=8, duration_ms=100, window_ms=16, hop_ms=24)
RNG = np.random.default_rng(0)


def to_hz(mel):
    return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)


def to_mel(hz):
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def slow_log_mel(x, rate, num_mels, duration, window, hop, dynamic_range):
    """Everything in samples, by loops and the definition of the discrete Fourier transform."""
    x = [*x[:duration], *[0.0] * (duration - len(x))]
    at = lambda t: x[-t if t < 0 else t if t < duration else 2 * duration - 2 - t]
    edges = [to_hz(to_mel(rate / 2) * i / (num_mels + 1)) for i in range(num_mels + 2)]
    columns = []
    for centre in range(0, duration + 1, hop):
        frame = [
            at(centre - window // 2 + t) * (0.5 - 0.5 * math.cos(2 * math.pi * t / window))
            for t in range(window)
        ]
        column = [0.0] * num_mels
        for b in range(window // 2 + 1):
            angle = [2 * math.pi * b * t / window for t in range(window)]
            real = sum(v * math.cos(a) for v, a in zip(frame, angle))
            imaginary = sum(v * math.sin(a) for v, a in zip(frame, angle))
            hz = b * rate / window
            for m in range(num_mels):
                low, top, high = edges[m : m + 3]
                height = (hz - low) / (top - low) if hz < top else (high - hz) / (high - top)
                area = (high - low) / 2
                column[m] += max(height, 0) / area * (real**2 + imaginary**2)
        columns.append(column)
    db = [10 * math.log10(max(column[m], 1e-10)) for m in range(num_mels) for column in columns]
    return [max(value - max(db), -dynamic_range) for value in db]


@pytest.mark.parametrize("samples", [800, 500, 1000])
@pytest.mark.parametrize(("dynamic_range", "num_mels"), [(80.0, 8), (15.0, 5)])
def test_log_mel_is_the_formula(samples, dynamic_range, num_mels):
    x = np.sin(np.arange(samples) ** 1.5 / 40) * np.linspace(1, 100, samples)
    settings = data.LogMel(num_mels, 100, 16, 24, dynamic_range)
    assert (settings.num_frames, settings.num_features) == (5, 5 * num_mels)
    want = slow_log_mel(x, 8000, num_mels, 800, 128, 192, dynamic_range)
    got = np.asarray(data.log_mel(x, 8000, settings))
    loud = np.array(want) > -60  # below that float32 rounds the loud frequencies' leakage
    np.testing.assert_allclose(got[loud], np.array(want)[loud], atol=1e-4)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_an_odd_window_is_centred_too():
    settings = data.LogMel(4, 100, 13, 20)
    x = RNG.normal(size=500)
    want = slow_log_mel(x, 5000, 4, 500, 65, 100, 80.0)
    np.testing.assert_allclose(data.log_mel(x, 5000, settings), want, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("band", [5, 40, 90, 126])
def test_a_tone_is_loudest_in_its_band(rate, band):
    tone = to_hz(to_mel(rate / 2) * (band + 1) / 129)  # the centre of the band, of 128
    x = 1000 * np.sin(2 * np.pi * tone * np.arange(rate) / rate)
    picture = np.asarray(data.log_mel(x, rate)).reshape(128, 32)
    np.testing.assert_array_equal(picture[:, 1:-1].argmax(axis=0), band)
    late = np.asarray(data.log_mel(x * (np.arange(rate) > rate / 2), rate)).reshape(128, 32)
    assert late[band, :10].max() == -80
    assert late[band, 18:30].min() > -0.1  # the second half of the second is the last frames


def test_batches_jit_and_length_change_nothing():
    x = RNG.normal(size=(2, 3, 900)).astype(np.float32)
    got = data.log_mel(x, 8000, SMALL)
    assert got.dtype == np.float32
    assert got.shape == (2, 3, SMALL.num_features)
    one = [[data.log_mel(row, 8000, SMALL) for row in rows] for rows in x]
    np.testing.assert_allclose(got, one, atol=1e-4)
    jitted = jax.jit(lambda x: data.log_mel(x, 8000, SMALL))(x)
    np.testing.assert_allclose(jitted, got, atol=1e-4)
    np.testing.assert_allclose(data.log_mel(x[..., :800], 8000, SMALL), got, atol=1e-4)  # is cut
    padded = np.pad(x[..., :300], [(0, 0), (0, 0), (0, 500)])
    short = data.log_mel(x[..., :300], 8000, SMALL)
    np.testing.assert_allclose(short, data.log_mel(padded, 8000, SMALL), atol=1e-4)


def test_loudness_does_not_matter_and_silence_is_zero():
    x = RNG.integers(-300, 300, 800)
    got = np.asarray(data.log_mel(x, 8000, SMALL))
    np.testing.assert_allclose(data.log_mel(x * 50, 8000, SMALL), got, atol=1e-4)
    assert got.max() == 0
    assert not np.asarray(data.log_mel(np.zeros(800), 8000, SMALL)).any()


def test_features_are_float32_in_double_precision_too(x64):
    x = RNG.normal(size=800)
    assert data.log_mel(x, 8000, SMALL).dtype == np.float32


def prepare(folder, name, rate, splits, num_classes):
    """What TFDS writes: `splits` is {name: shards of (samples, label, file name)}."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = folder / name / "1.0.10"
    folder.mkdir(parents=True)
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            file = folder / f"{name}-{split}.array_record-{i:05d}-of-{len(shards):05d}"
            writer = ArrayRecordWriter(str(file), "group_size:1")
            for samples, label, file_name in shard:
                example = tf_example_pb2.Example()  # pyright: ignore
                feature = example.features.feature
                feature["audio"].int64_list.value.extend(samples)
                feature["label"].int64_list.value.append(label)
                if file_name:
                    feature["audio/filename"].bytes_list.value.append(file_name.encode())
                writer.write(example.SerializeToString())
            writer.close()
    sizes = [{"name": k, "shardLengths": [str(len(s)) for s in v]} for k, v in splits.items()]
    (folder / "dataset_info.json").write_text(json.dumps({"splits": sizes}))
    features = {
        "audio": {"audio": {"sampleRate": str(rate)}},
        "label": {"classLabel": {"numClasses": str(num_classes)}},
    }
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))


def recording(label, file_name="", size=800):
    return RNG.integers(-3000, 3000, size).tolist(), label, file_name


def features_of(recordings, rate=8000):
    whole = [np.pad(x[:800], (0, 800 - len(x[:800]))) for x, _, _ in recordings]
    return np.asarray(jax.jit(lambda x: data.log_mel(x, rate, SMALL))(np.stack(whole)))


def test_prepared_records_come_in_their_order_whatever_their_length(tmp_path):
    train = [recording(i % 12, size=500 + 10 * i) for i in range(130)]
    test = [recording(3), recording(11)]
    splits = {"train": [train[:70], train[70:]], "validation": [test[:1]], "test": [test]}
    prepare(tmp_path, "speech_commands", 8000, splits, 12)
    where = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "settings": SMALL}
    for split, own in (("train", train), ("validation", test[:1]), ("test", test)):
        got = data.load_speech("speech_commands", split, **where)
        np.testing.assert_array_equal(got.labels, [y for _, y, _ in own])
        np.testing.assert_allclose(got.features, features_of(own), atol=1e-4)
        assert (got.features.dtype, got.labels.dtype) == (np.float32, np.int32)
        assert (got.name, got.num_classes) == ("speech_commands", 12)
    full = data.load_speech("speech_commands", "train", only_full=True, **where)
    assert full.labels.tolist() == [30 % 12]  # only number 30 has 800 samples


def test_the_first_five_recordings_of_digit_and_speaker_are_the_test_set(tmp_path):
    names = [f"{d}_{who}_{i}.wav" for d in (7, 0) for who in ("ann", "bob") for i in (11, 4, 0, 5)]
    shard = [recording(int(name[0]), name) for name in names]
    prepare(tmp_path, "spoken_digit", 8000, {"train": [shard]}, 10)
    where = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path), "settings": SMALL}
    for split, indices in (("train", ("11", "5")), ("test", ("4", "0"))):
        own = [r for r in shard if r[2][:-4].split("_")[2] in indices]
        got = data.load_speech("spoken_digit", split, **where)
        assert got.labels.tolist() == [y for _, y, _ in own]
        np.testing.assert_allclose(got.features, features_of(own), atol=1e-4)


def digits(tmp_path):
    shard = [recording(i % 10, f"{i % 10}_ann_{i}.wav") for i in range(20)]
    prepare(tmp_path, "spoken_digit", 8000, {"train": [shard]}, 10)
    where = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    return lambda settings=SMALL, **kw: data.load_speech(settings=settings, **where, **kw)


def test_a_second_load_computes_nothing_and_other_settings_do(tmp_path, monkeypatch):
    load = digits(tmp_path)
    first = load()
    calls = []
    compute = _speech._compute
    monkeypatch.setattr(_speech, "_compute", lambda *a: calls.append(a) or compute(*a))
    second = load()
    assert not calls
    np.testing.assert_array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.labels, second.labels)
    load(data.LogMel(num_mels=9, duration_ms=100, window_ms=16, hop_ms=24))
    load(split="test")
    load(only_full=True)
    assert len(calls) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "a bit", "text"])
def test_a_damaged_cache_is_computed_again(damage, tmp_path):
    load = digits(tmp_path)
    first = load()
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 3] ^= 1
    damaged = {"empty": b"", "cut": good[: len(good) // 2], "a bit": bytes(bad), "text": b"hello"}
    file.write_bytes(damaged[damage])
    second = load()
    np.testing.assert_array_equal(first.features, second.features)
    assert file.read_bytes() == good


def test_recordings_replaced_by_others_of_equal_size_are_computed_again(tmp_path):
    """Also where the new file has the old one's time."""
    load = digits(tmp_path)
    first = load()
    (file,) = tmp_path.rglob("*.array_record*")
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    other = tmp_path / "other"
    shard = [recording(i % 10, f"{i % 10}_ann_{i}.wav") for i in range(20)]
    prepare(other, "spoken_digit", 8000, {"train": [shard]}, 10)
    next(other.rglob("*.array_record*")).replace(file)
    assert file.stat().st_size == size
    os.utime(file, ns=times)
    second = load()
    train = [r for r in shard if int(r[2].split("_")[2][:-4]) >= 5]
    np.testing.assert_allclose(second.features, features_of(train), atol=1e-4)
    assert np.abs(second.features - first.features).max() > 1


def test_another_sample_rate_in_the_metadata_is_computed_again(tmp_path):
    load = digits(tmp_path)
    first = load()
    (file,) = tmp_path.rglob("features.json")
    file.write_text(file.read_text().replace("8000", "4000"))
    assert np.abs(load().features - first.features).max() > 1


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    load = digits(tmp_path)

    def interrupted(stream, **arrays):
        stream.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert not list((tmp_path / "cache").iterdir())
    assert load().labels.size == 15


def write_wav(file, samples, rate=16000, channels=1):
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(np.asarray(samples, "<i2").tobytes())


@pytest.fixture
def archive(tmp_path):
    """Three recordings of three speakers for each of the 35 words; and one of half the length."""
    names = []
    for word in data.WORDS:
        (tmp_path / word).mkdir()
        for speaker in ("a1", "b2", "c4"):
            names.append(f"{word}/{speaker}_nohash_0.wav")
            write_wav(tmp_path / names[-1], RNG.integers(-9000, 9000, 1600))
    write_wav(tmp_path / "zero" / "b2_nohash_0.wav", RNG.integers(-9000, 9000, 800))
    (tmp_path / "_background_noise_").mkdir()
    write_wav(tmp_path / "_background_noise_" / "tap.wav", [1] * 1600)
    (tmp_path / "testing_list.txt").write_text("".join(n + "\n" for n in names[1::3]))
    (tmp_path / "validation_list.txt").write_text("".join(n + "\n" for n in names[2::30]))
    return tmp_path, names


def test_the_archives_lists_make_three_splits_of_35_words(archive):
    folder, names = archive
    assert len(data.WORDS) == 35
    assert list(data.WORDS) == sorted(set(data.WORDS))
    where = {"data_dir": str(folder), "cache_dir": str(folder / "cache"), "settings": SMALL}
    wanted = {"test": names[1::3], "validation": names[2::30]}
    wanted["train"] = [n for n in names if n not in {*wanted["test"], *wanted["validation"]}]
    for split, own in wanted.items():
        got = data.load_speech("speech_commands", split, labels="words", **where)
        assert got.num_classes == 35
        assert [data.WORDS[y] for y in got.labels] == [n.split("/")[0] for n in own]
    with wave.open(str(folder / wanted["test"][-1]), "rb") as stream:  # the short one
        samples = np.frombuffer(stream.readframes(1600), np.int16)
    got = data.load_speech("speech_commands", "test", labels="words", **where)
    np.testing.assert_allclose(got.features[-1], data.log_mel(samples, 16000, SMALL), atol=1e-4)
    full = data.load_speech("speech_commands", "test", labels="words", only_full=True, **where)
    assert len(full.labels) == len(got.labels) - 1


def test_the_hash_split_keeps_speakers_together(archive):
    folder, names = archive
    where = {"data_dir": str(folder), "cache_dir": str(folder / "cache"), "settings": SMALL}
    in_test = {  # the README's rule: less than 20 % of 2**27 - 1
        who: int(hashlib.sha1(who.encode()).hexdigest(), 16) % 2**27 < 0.2 * (2**27 - 1)
        for who in ("a1", "b2", "c4")
    }
    assert set(in_test.values()) == {True, False}
    for split in ("train", "test"):
        got = data.load_speech("speech_commands", split, labels="words", split_by="hash", **where)
        share = sum(v == (split == "test") for v in in_test.values())
        np.testing.assert_array_equal(got.labels, np.repeat(np.arange(35), share))
    shares = [_recordings._in_a_fifth(f"yes/{i:08x}_nohash_1.wav") for i in range(2000)]
    assert 0.17 < np.mean(shares) < 0.23


def test_a_waveform_replaced_by_one_of_equal_size_is_computed_again(archive):
    """Also where the new file has the old one's time."""
    folder, names = archive
    load = lambda: data.load_speech(
        "speech_commands",
        "test",
        labels="words",
        data_dir=str(folder),
        cache_dir=str(folder / "cache"),
        settings=SMALL,
    )
    first, file = load(), folder / names[1::3][7]
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    new = RNG.integers(-9000, 9000, 1600)
    write_wav(file, new)
    assert file.stat().st_size == size
    os.utime(file, ns=times)
    second = load()
    np.testing.assert_allclose(second.features[7], data.log_mel(new, 16000, SMALL), atol=1e-4)
    others = np.arange(len(first.labels)) != 7
    np.testing.assert_array_equal(second.features[others], first.features[others])


@pytest.mark.parametrize("left", [1, 2, 1000, 3198, 3199])
def test_a_waveform_cut_inside_its_data_is_an_error(archive, left):
    folder, names = archive
    file = folder / names[0]
    file.write_bytes(file.read_bytes()[: 44 + left])
    said = "is cut off: it has" if left % 2 == 0 else f"{left} bytes"
    with pytest.raises(ValueError, match=f"{names[0]} .*{said}"):
        data.load_speech(
            "speech_commands", labels="words", data_dir=str(folder), cache_dir=str(folder)
        )


def test_what_is_wrong_with_the_archive_is_named(archive):
    folder, names = archive
    load = lambda **kw: data.load_speech(
        "speech_commands", labels="words", data_dir=str(folder), cache_dir=str(folder), **kw
    )
    write_wav(folder / names[0], [1] * 8, rate=8000)
    with pytest.raises(ValueError, match="backward/a1_nohash_0.wav has 1 channels of 16 .* 8000"):
        load()
    (folder / names[0]).write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="backward/a1_nohash_0.wav is not a wav file"):
        load()
    (folder / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match="'backward/b2_nohash_0.wav' and 0 others"):
        load()
    (folder / "testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"'testing_list.txt' and 0 .*Unpack http"):
        load()


def test_a_set_that_is_not_prepared_says_how_to(tmp_path):
    for name in ("spoken_digit", "speech_commands"):
        with pytest.raises(FileNotFoundError, match=rf"builder\('{name}'.*download_and_prepare"):
            data.load_speech(name, data_dir=str(tmp_path), cache_dir=str(tmp_path))
    prepare(tmp_path, "spoken_digit", 8000, {"train": [[recording(0, "0_a_1.wav")]]}, 10)
    next(tmp_path.rglob("*.array_record*")).unlink()
    with pytest.raises(FileNotFoundError, match="00000-of-00001 is missing. Copy it again"):
        data.load_speech(data_dir=str(tmp_path), cache_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "shard"])
@pytest.mark.parametrize("damage", ["cut", "empty", "{}", "a folder"])
def test_a_damaged_file_is_named(name, damage, tmp_path):
    shard = [recording(0, "0_a_7.wav"), recording(1, "1_a_8.wav")]
    prepare(tmp_path, "spoken_digit", 8000, {"train": [shard]}, 10)
    (file,) = tmp_path.rglob("*.array_record*" if name == "shard" else name)
    whole = file.read_bytes()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        cut = whole[: len(whole) // 2]
        file.write_bytes({"cut": cut, "empty": b"", "{}": b"{}"}[damage])
    with pytest.raises(ValueError, match=r"cannot be read \(.*prepare the set again") as caught:
        data.load_speech(data_dir=str(tmp_path), cache_dir=str(tmp_path))
    named = file if name == "shard" else file.with_name("dataset_info.json")
    assert str(named) in str(caught.value) or str(file.parent) in str(caught.value)


def test_a_recording_without_samples_is_an_error(tmp_path):
    shard = [recording(0, "0_a_7.wav"), ([], 1, "1_a_8.wav")]
    prepare(tmp_path, "spoken_digit", 8000, {"train": [shard]}, 10)
    with pytest.raises(ValueError, match="record 1, counted from 0, has no samples"):
        data.load_speech(data_dir=str(tmp_path), cache_dir=str(tmp_path))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such set.*'spoken_digit', labels='all'"):
        data.load_speech("mnist")
    with pytest.raises(ValueError, match="no such set"):
        data.load_speech("spoken_digit", labels="words")
    with pytest.raises(ValueError, match="pass split='train' or 'test'"):
        data.load_speech("spoken_digit", "validation")
    with pytest.raises(ValueError, match=r"LogMel\(num_mels=0\): pass a positive integer"):
        data.LogMel(num_mels=0)
    with pytest.raises(ValueError, match=r"LogMel\(window_ms=200\): longer"):
        data.LogMel(window_ms=200, duration_ms=100)
    with pytest.raises(ValueError, match=r"float32\[\]; pass real \[..., samples\]"):
        data.log_mel(np.float32(1), 8000)
    with pytest.raises(ValueError, match="sample_rate=0"):
        data.log_mel(np.zeros(8), 0)
    with pytest.raises(ValueError, match="mel band 0 of 128 lies between two frequencies"):
        data.log_mel(np.zeros(8000), 8000, data.LogMel(window_ms=16))
    prepare(tmp_path, "spoken_digit", 8000, {"train": [[recording(0, "nothing.wav")]]}, 10)
    with pytest.raises(ValueError, match="file name 'nothing.wav' is not"):
        data.load_speech(data_dir=str(tmp_path), cache_dir=str(tmp_path))


def test_spoken_digit_is_2500_recordings(tmp_path):
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / "spoken_digit"
    if not folder.is_dir():
        pytest.skip("spoken_digit is not prepared in TFDS_DATA_DIR")
    for split, each in (("train", 225), ("test", 25)):
        got = data.load_speech("spoken_digit", split, cache_dir=str(tmp_path))
        assert got.features.shape == (10 * each, 4096)
        assert got.num_classes == 10
        np.testing.assert_array_equal(np.bincount(got.labels), [each] * 10)
        assert (got.features.min(), got.features.max()) == (-80, 0)
        assert np.isfinite(got.features).all()
