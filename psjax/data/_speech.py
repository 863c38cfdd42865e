"""Spoken words as log-mel features: 128 mel bands x 32 frames = 4096 numbers per recording.

Section 6 of B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using
Independent Subnet Training*, arXiv:1910.02120, measures on such data. The mel scale is from
Stevens, Volkmann, Newman: *A scale for the measurement of the psychological magnitude pitch*,
JASA 8, 1937, in the formula of Slaney's Auditory Toolbox (Interval Research, technical report
1998-010).
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from psjax.data._recordings import Folders, Records


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Settings of `log_mel`. The defaults are those of the paper's public code.

    Attributes:
      num_mels: number of mel bands from 0 to half the sample rate.
      duration_ms: the length to which a waveform is padded with zeros, or cut, at its end.
      window_ms: length of the Hann window of a frame.
      hop_ms: time between the centres of two frames; the first centre is the first sample.
      dynamic_range: range below the maximum of a recording, in dB; lower values are raised to it.
    """

    num_mels: int = 128
    duration_ms: int = 1000
    window_ms: int = 128
    hop_ms: int = 32
    dynamic_range: float = 80.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            whole = name == "dynamic_range" or isinstance(value, int)
            if not whole or not value > 0:
                kind = "number" if name == "dynamic_range" else "integer"
                msg = f"LogMel({name}={value!r}): pass a positive {kind}."
                raise ValueError(msg)
        if self.window_ms > self.duration_ms:
            msg = f"LogMel(window_ms={self.window_ms}): longer than duration_ms={self.duration_ms}."
            raise ValueError(msg)

    @property
    def num_frames(self) -> int:
        """Number of frames with their centre within the duration; 32 by default."""
        return 1 + self.duration_ms // self.hop_ms

    @property
    def num_features(self) -> int:
        """Numbers per recording; 4096 by default."""
        return self.num_mels * self.num_frames


def _hz(mel: np.ndarray):
    """Slaney's scale: 3 mels every 200 Hz up to 1000 Hz, then 27 for every factor 6.4."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


@functools.cache
def _filters(sample_rate: int, window: int, num_mels: int):
    """Triangles of area 1 in Hz, `[window // 2 + 1, num_mels]` float32."""
    half = sample_rate / 2
    top = half * 3 / 200 if half < 1000 else 15 + 27 * np.log(half / 1000) / np.log(6.4)
    low, centre, high = (_hz(np.linspace(0, top, num_mels + 2))[i : num_mels + i] for i in range(3))
    bins = np.arange(window // 2 + 1)[:, None] * sample_rate / window
    rise, fall = (bins - low) / (centre - low), (high - bins) / (high - centre)
    filters = np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)
    empty = np.flatnonzero(~filters.any(axis=0))
    if empty.size:
        msg = (
            f"log_mel(sample_rate={sample_rate}): mel band {empty[0]} of {num_mels} lies between "
            f"two frequencies of a window of {window} samples; pass a longer window_ms or fewer "
            "num_mels."
        )
        raise ValueError(msg)
    return filters.astype(np.float32)


def log_mel(waveform: ArrayLike, sample_rate: int, settings: LogMel = LogMel()):
    r"""Log-mel power of recordings, in dB below the maximum of each recording, flattened.

    The features are in [-80, 0] by default, whatever the loudness; silence is 0 everywhere. It runs
    inside `jit` and `vmap`, always in float32.

    The waveform is padded with zeros at its end, or cut, to `duration_ms`, and mirrored at both
    ends by half a window. Frame f is a periodic Hann window centred at `f hop_ms`. Let $X_{fb}$ be
    its discrete Fourier transform, and $H_{bm}$ triangles that overlap by half on the mel scale and
    have area 1 in Hz. With the power $P_{mf} = \sum_b H_{bm} |X_{fb}|^2$, at least 1e-10, and the
    dynamic range d, feature $32 m + f$ is $\max(10 \log_{10}(P_{mf} / \max P), -d)$.

    With the default settings, at 16 kHz, these are the numbers of the paper's public code:
    `librosa.feature.melspectrogram(n_mels=128)` and `librosa.power_to_db(ref=np.max)` of librosa
    before 0.10 (later versions need `pad_mode="reflect"`). They are not standardised.

    Args:
      waveform: `[..., samples]`, integers or floats, one channel, any unit; its length is static.
      sample_rate: sample rate in Hz, static.
      settings: settings of the features, static.

    Returns:
      `[..., num_mels * num_frames]`, float32, band by band:
      `.reshape(..., num_mels, num_frames)` is the picture.

    Raises:
      ValueError: there are no samples, the sample rate is not a positive integer, or the window
        cannot separate so many mel bands.

    Example:
      >>> log_mel(jnp.zeros((5, 8000)), 8000).shape
      (5, 4096)
    """
    waveform = jnp.asarray(waveform)
    if not waveform.ndim or not waveform.shape[-1] or jnp.iscomplexobj(waveform):
        msg = (
            f"log_mel(waveform, {sample_rate}): the waveform is {waveform.dtype}"
            f"{list(waveform.shape)}; pass real [..., samples]."
        )
        raise ValueError(msg)
    if not isinstance(sample_rate, int) or sample_rate <= 0:
        msg = f"log_mel(waveform, sample_rate={sample_rate!r}): pass a positive integer, in Hz."
        raise ValueError(msg)
    size = sample_rate * settings.duration_ms // 1000
    window = sample_rate * settings.window_ms // 1000
    filters = _filters(sample_rate, window, settings.num_mels)
    waveform = waveform[..., :size].astype(jnp.float32)
    before = [(0, 0)] * (waveform.ndim - 1)
    waveform = jnp.pad(waveform, [*before, (0, size - waveform.shape[-1])])
    waveform = jnp.pad(waveform, [*before, (window // 2, window - window // 2)], mode="reflect")
    starts = np.arange(settings.num_frames) * settings.hop_ms * sample_rate // 1000
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = waveform[..., starts[:, None] + np.arange(window)] * hann.astype(np.float32)
    power = jnp.square(jnp.abs(jnp.fft.rfft(frames)))
    # Errors of TF32, the default precision of a GPU, would be visible 60 dB below the maximum.
    mel = jnp.einsum("...fb,bm->...mf", power, filters, precision="highest")
    mel = mel.reshape(*mel.shape[:-2], settings.num_features)
    db = 10 * jnp.log10(jnp.maximum(mel, 1e-10))
    return jnp.clip(db - db.max(axis=-1, keepdims=True), -settings.dynamic_range, 0)


class SpeechDataset(NamedTuple):
    """Log-mel features and labels of one split.

    Attributes:
      name: name of the set.
      features: `[N, num_features]`, float32, as `log_mel` returns them.
      labels: `[N]`, int32 in `[0, num_classes)`.
      num_classes: C.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray
    num_classes: int


_SPLITS = {
    ("spoken_digit", "all", "official"): ("train", "test"),
    ("speech_commands", "all", "official"): ("train", "validation", "test"),
    ("speech_commands", "words", "official"): ("train", "validation", "test"),
    ("speech_commands", "words", "hash"): ("train", "test"),
}


def load_speech(
    name: str = "spoken_digit",
    split: str = "train",
    data_dir: str | None = None,
    cache_dir: str | None = None,
    settings: LogMel = LogMel(),
    labels: str = "all",
    split_by: str = "official",
    only_full: bool = False,
) -> SpeechDataset:
    """Load one split of a set of spoken words as log-mel features, in the order of the set.

    - `spoken_digit`: the Free Spoken Digit Dataset, 2500 recordings of ten digits at 8 kHz,
      prepared by TensorFlow Datasets (TFDS). TFDS has no test split; its authors use recordings 0
      to 4 of each digit and speaker, which gives 2250 and 250.
    - `speech_commands`: Warden, *Speech Commands*, https://arxiv.org/abs/1804.03209, 16 kHz,
      prepared by TFDS, with 12 labels: ten words, silence, and all other words as unknown. The
      records of TFDS have no file names, so that the other words cannot be told apart.
    - `speech_commands` with `labels="words"`: all 35 words, read from the folders of the archive
      `speech_commands_v0.02.tar.gz`. The paper's public code has these labels, makes its own split
      (`split_by="hash"`), and leaves shorter recordings out (`only_full=True`).

    `log_mel` computes the features once; of recordings longer than a second, it uses the beginning.
    They are stored in `cache_dir`, in one file per split, settings and content of the data's files.
    A damaged file is computed again. All of `speech_commands` takes about 1.7 GB. Every call reads
    the data's files to compare their content.

    Args:
      name: `spoken_digit` or `speech_commands`.
      split: `train` or `test`, or `validation` if the set has it.
      data_dir: the folder of TFDS's sets; None: `TFDS_DATA_DIR`, else `~/tensorflow_datasets`. With
        `labels="words"`, the folder that contains the folders of the 35 words.
      cache_dir: the folder for features; None: `PSJAX_CACHE_DIR`, else `~/.cache/psjax`.
      settings: settings of the features.
      labels: `all` for the labels of the prepared set, or `words`.
      split_by: how to split with `labels="words"`. `official`: by the archive's `testing_list.txt`
        and `validation_list.txt`. `hash`: by a hash of the speakers' names, given in the archive's
        README, a fifth of the speakers is the test set and the others are the training set.
      only_full: whether to leave out recordings that do not last exactly `duration_ms`.

    Raises:
      ValueError: the set, split or combination is unknown, or a file is damaged (the message names
        it).
      FileNotFoundError: a set or a file does not exist; the message says what to do.
      ImportError: tensorflow-datasets or array_record is not installed.
    """
    call = f"load_speech({name!r}, split={split!r}, labels={labels!r}, split_by={split_by!r})"
    splits = _SPLITS.get((name, labels, split_by))
    if splits is None:
        known = "; ".join(f"{n!r}, labels={k!r}, split_by={s!r}" for n, k, s in _SPLITS)
        msg = f"{call}: no such set. There are: {known}."
        raise ValueError(msg)
    if split not in splits:
        msg = f"{call}: pass split={' or '.join(map(repr, splits))}."
        raise ValueError(msg)
    if labels == "words":
        source = Folders(call, data_dir, split, split_by)
    else:
        source = Records(call, name, data_dir, split)
    what = (3, name, split, labels, split_by, only_full, source.sample_rate, source.fingerprint)
    key = json.dumps([*what, dataclasses.asdict(settings)])
    default = os.environ.get("PSJAX_CACHE_DIR") or "~/.cache/psjax"
    file = Path(cache_dir or default).expanduser()
    file /= f"{name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    features, targets = _read_cache(file, settings) or _compute(source, settings, only_full)
    if not len(targets):
        msg = f"{call}: no recording is left."
        raise ValueError(msg)
    if not file.exists():
        _write_cache(file, features, targets)
    return SpeechDataset(name, features, targets, source.num_classes)


def _compute(source: Records | Folders, settings: LogMel, only_full: bool, chunk: int = 128):
    """Features and labels of all recordings, `chunk` at a time in one compiled program."""
    rate = source.sample_rate
    size = rate * settings.duration_ms // 1000
    compiled = jax.jit(lambda x: log_mel(x, rate, settings))
    features, targets = [np.zeros((0, settings.num_features), np.float32)], []
    for start in range(0, len(source), chunk):
        own = source.read(range(start, min(start + chunk, len(source))))
        own = [(x, y) for x, y in own if not only_full or len(x) == size]
        waveforms = np.zeros((chunk, size), np.float32)
        for row, (x, _) in zip(waveforms, own):
            row[: len(x)] = x[:size]
        features.append(np.asarray(compiled(waveforms))[: len(own)])
        targets += [y for _, y in own]
    return np.concatenate(features), np.asarray(targets, np.int32)


def _read_cache(file: pathlib.Path, settings: LogMel):
    """Features and labels; None if there is no file, or a damaged one, which is removed."""
    if not file.exists():
        return None
    try:
        with file.open("rb") as stream:
            arrays: Any = np.load(stream, allow_pickle=False)  # the format checks CRCs
            features, labels = arrays["features"], arrays["labels"]
        if features.shape == (len(labels), settings.num_features):
            return features, labels
    except Exception:  # a damaged file can raise anything, and is always removed
        pass
    file.unlink(missing_ok=True)
    return None


def _write_cache(file: pathlib.Path, features: np.ndarray, labels: np.ndarray):
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, features=features, labels=labels)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
