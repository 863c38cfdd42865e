"""The text format of the Extreme Classification repository, and batches of its rows.

Bhatia, Dahiya, Jain, Kar, Mittal, Prabhu, Varma: *The extreme classification repository:
multi-label datasets and code*, 2016, http://manikvarma.org/downloads/XC/XMLRepository.html.
"""

import pathlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer, UInt8

from psjax._types import Labels

_BLOCK = 1 << 24  # bytes parsed at once
_HEADER = re.compile(rb"\s*(\d+)\s+(\d+)\s+(\d+)\s*")
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.I)
_MOST = np.iinfo(np.int32).max  # the largest id
_SPACE, _COMMA, _COLON, _NEWLINE = b" ,:\n"


class SparseDataset(NamedTuple):
    """Points with sparse features and several labels each, both as compressed rows.

    Row i has the features `indices[indptr[i]:indptr[i + 1]]`, the values at the same places, and
    the labels `label_indices[label_indptr[i]:label_indptr[i + 1]]`, in the order of the file.

    Attributes:
      indptr: `[N + 1]`, int64.
      indices: `[nonzeros]`, int32 in `[0, num_features)`, no two equal in a row.
      values: `[nonzeros]`, float32, finite.
      label_indptr: `[N + 1]`, int64.
      label_indices: `[ones]`, int32 in `[0, num_labels)`, no two equal in a row.
      num_features: number of features.
      num_labels: number of labels.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    label_indptr: np.ndarray
    label_indices: np.ndarray
    num_features: int
    num_labels: int


def read_xc(
    path: str | Path, split_file: str | Path | None = None, column: int | None = None
) -> SparseDataset:
    """Read a data set in the repository's text format.

    The first line is `num_points num_features num_labels`. Each further line is a point, with its
    labels and its features counted from 0: `l1,l2,l3 f1:v1 f2:v2`. The line of a point without
    labels starts with a space. Every line ends with a newline, and so does the last: a file without
    it was cut off. A feature or label that occurs twice in a line is an error, because the format
    does not say whether to add or to replace.

    Args:
      path: path of the file.
      split_file: path of a split file, for small sets of the repository, which are one file with
        all points. Each column of a split file is a split: it has numbers of points, counted from
        1, and the points are returned in this order. None: all points.
      column: column of `split_file`, from 0; None if it has only one.

    Raises:
      ValueError: the file is not in this format: the header has another form, there are too many or
        too few lines, a token is malformed, an id is out of range or too large for int32, a feature
        or label is repeated, a value is not finite in float32, or the last line is cut off. The
        message has the file and the number of the line (the header is line 1). Or the split file
        has another format, or no such column.
    """
    call = f"read_xc({str(path)!r})"
    with open(path, "rb") as file:
        header = file.readline()
        match = _HEADER.fullmatch(header)
        if not match:
            msg = (
                f"{call}: line 1 is {_show(header)}; the header is 'num_points num_features "
                "num_labels'."
            )
            raise ValueError(msg)
        num_points, num_features, num_labels = map(_integer, match.groups())
        if max(num_points, num_features, num_labels) == 10**18:
            msg = f"{call}: line 1 is {_show(header)}; its numbers must have 18 digits or fewer."
            raise ValueError(msg)
        line, parts = 2, []
        while lines := file.readlines(_BLOCK):
            if not lines[-1].endswith(b"\n"):
                msg = (
                    f"{call}: line {line + len(lines) - 1} is cut off: it has no newline. Fetch "
                    "the file again, or end it with a newline if it is whole."
                )
                raise ValueError(msg)
            if line + len(lines) - 2 > num_points:
                msg = (
                    f"{call}: line {num_points + 2} is one too many: the header says {num_points} "
                    "points."
                )
                raise ValueError(msg)
            block = b"".join(lines).replace(b"\r\n", b"\n")
            parsed = _parse_block(block, num_features, num_labels)
            if parsed is None:
                parsed = _parse_lines(block, num_features, num_labels, call, line)
            parts.append(parsed)
            line += len(lines)
    if line - 2 != num_points:
        msg = (
            f"{call}: line {line - 1} is the last, that is {line - 2} points; the header says "
            f"{num_points}."
        )
        raise ValueError(msg)
    parts.append(_arrays([], [], [], [], []))
    counts, indices, values, label_counts, labels = map(np.concatenate, zip(*parts))
    data = SparseDataset(
        _indptr(counts), indices, values, _indptr(label_counts), labels, num_features, num_labels
    )
    return data if split_file is None else _take(data, _read_split(split_file, column, num_points))


def _show(line: bytes):
    text = line.decode("utf-8", "replace").strip("\r\n")
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _indptr(counts: Sequence[int] | Integer[np.ndarray, " n"]):
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _arrays(
    counts: Sequence[int] | Integer[np.ndarray, " n"],
    indices: Sequence[int] | Integer[np.ndarray, " nnz"],
    values: Sequence[float | np.floating] | Float[np.ndarray, " nnz"],
    label_counts: Sequence[int] | Integer[np.ndarray, " n"],
    labels: Sequence[int] | Integer[np.ndarray, " m"],
):
    return (
        np.asarray(counts, np.int64),
        np.asarray(indices, np.int32),
        np.asarray(values, np.float32),
        np.asarray(label_counts, np.int64),
        np.asarray(labels, np.int32),
    )


def _parse_block(block: bytes, num_features: int, num_labels: int):
    """Parse whole lines by array operations; None if anything is unusual, for `_parse_lines`."""
    text = np.frombuffer(block, np.uint8)
    if ((text < _SPACE) & (text != _NEWLINE)).any():
        return None
    is_end = (text == _SPACE) | (text == _COMMA) | (text == _COLON) | (text == _NEWLINE)
    ends = np.flatnonzero(is_end)
    after = text[ends]  # the characters after and before a token determine its kind
    before = np.concatenate([[np.uint8(_NEWLINE)], after[:-1]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    empty = starts == ends
    spaced = (after == _SPACE) | (after == _NEWLINE)
    blank = empty & (((before == _NEWLINE) & (after == _SPACE)) | ((before == _SPACE) & spaced))
    label = ((before == _NEWLINE) | (before == _COMMA)) & (after != _COLON) & ~blank
    feature = (before == _SPACE) & (after == _COLON)
    value = (before == _COLON) & spaced
    if not (blank | ((label | feature | value) & ~empty)).all():
        return None
    row = np.cumsum(before == _NEWLINE) - 1
    num_rows = int(row[-1]) + 1
    parsed = []
    for kind, size in ((feature, num_features), (label, num_labels)):
        ids = _integers(text, starts[kind], ends[kind])
        if ids is None or (ids.size and ids.max() >= size):
            return None
        keys = row[kind] * size + ids
        if (np.diff(keys) <= 0).any() and (np.diff(np.sort(keys)) == 0).any():
            return None
        parsed += [np.bincount(row[kind], minlength=num_rows), ids]
    inside = np.zeros(len(text), np.int8)
    inside[starts[value]] = 1
    inside[ends[value]] -= 1
    alone = np.where(np.cumsum(inside, dtype=np.int8) > 0, text, np.uint8(_SPACE)).tobytes()
    try:
        with warnings.catch_warnings():  # NumPy 2.0 only warns if it cannot read text
            warnings.simplefilter("error", DeprecationWarning)
            numbers = np.fromstring(alone, np.float64, sep=" ") if value.any() else np.zeros(0)
    except (ValueError, DeprecationWarning):
        return None
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    if len(numbers) != value.sum() or not np.isfinite(numbers).all():
        return None
    return _arrays(parsed[0], parsed[1], numbers, parsed[2], parsed[3])


def _integers(
    text: UInt8[np.ndarray, " size"],
    starts: Integer[np.ndarray, " n"],
    ends: Integer[np.ndarray, " n"],
):
    """Tokens of nine digits or fewer as int64; None if any token is something else."""
    lengths = ends - starts
    total = np.zeros(len(ends), np.int64)
    for place in range(int(lengths.max(initial=0))):
        here = np.flatnonzero(lengths > place)
        digit = text[ends[here] - 1 - place].astype(np.int64) - ord("0")
        if place > 8 or ((digit < 0) | (digit > 9)).any():
            return None
        total[here] += digit * 10**place
    return total


def _parse_lines(block: bytes, num_features: int, num_labels: int, call: str, first_line: int):
    """Do what `_parse_block` does, line by line: slow, but errors have the number of the line."""
    counts, indices, values, label_counts, labels = [], [], [], [], []
    for number, line in enumerate(block[:-1].split(b"\n"), first_line):
        where = f"{call}: line {number}:"
        if not line:
            msg = f"{where} is empty; a point without labels and features is one space."
            raise ValueError(msg)
        head, *tail = line.split(b" ")
        own_labels = [_id(t, where, "label", num_labels) for t in head.split(b",")] if head else []
        own = []
        for token in filter(None, tail):
            feature, colon, value = token.partition(b":")
            if not colon or not _NUMBER.fullmatch(value):
                msg = f"{where} {_show(token)} is not 'feature:value'."
                raise ValueError(msg)
            own.append(_id(feature, where, "feature", num_features))
            with np.errstate(over="ignore"):
                values.append(np.float32(float(value)))
            if not np.isfinite(values[-1]):
                msg = f"{where} value {_show(value)} of feature {own[-1]} is not finite in float32."
                raise ValueError(msg)
        for what, ids in (("feature", own), ("label", own_labels)):
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                msg = f"{where} {what} {twice} is repeated."
                raise ValueError(msg)
        counts.append(len(own))
        indices += own
        label_counts.append(len(own_labels))
        labels += own_labels
    return _arrays(counts, indices, values, label_counts, labels)


def _id(token: bytes, where: str, what: str, size: int):
    if not re.fullmatch(rb"\d+", token):
        msg = f"{where} {what} {_show(token)} is not an integer."
        raise ValueError(msg)
    number = _integer(token)
    if number >= size:
        msg = f"{where} {what} {_digits(token)} is outside [0, {size})."
        raise ValueError(msg)
    if number > _MOST:
        msg = f"{where} {what} {number} is outside [0, {_MOST + 1}): ids are int32."
        raise ValueError(msg)
    return number


def _integer(digits: bytes):
    """The number with these digits; a number larger than any id if `int` refuses that many."""
    return int(digits) if len(digits.lstrip(b"0")) <= 18 else 10**18


def _digits(token: bytes):
    return _show(token.lstrip(b"0") or b"0").strip("'")


def _read_split(path: str | pathlib.Path, column: int | None, num_points: int):
    call = f"read_xc(split_file={str(path)!r}, column={column})"
    rows, seen = [], {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        tokens = line.split()
        if column is None and len(tokens) != 1:
            msg = f"{call}: line {number} has {len(tokens)} columns; pass column=0, 1, ..."
            raise ValueError(msg)
        if not 0 <= (column or 0) < len(tokens):
            msg = f"{call}: line {number} has {len(tokens)} columns, counted from 0."
            raise ValueError(msg)
        token = tokens[column or 0]
        if not re.fullmatch(rb"\d+", token) or not 1 <= _integer(token) <= num_points:
            msg = f"{call}: line {number}: {_show(token)} is not an integer in [1, {num_points}]."
            raise ValueError(msg)
        if int(token) in seen:
            msg = f"{call}: line {number}: point {int(token)} is in line {seen[int(token)]} too."
            raise ValueError(msg)
        seen[int(token)] = number
        rows.append(int(token) - 1)
    return np.asarray(rows, np.int64)


def _take(data: SparseDataset, rows: Integer[np.ndarray, " n"]):
    def positions(indptr: Integer[np.ndarray, " N1"]):
        counts = np.diff(indptr)[rows]
        new = _indptr(counts)
        return new, np.arange(new[-1]) + np.repeat(indptr[rows] - new[:-1], counts)

    indptr, at = positions(data.indptr)
    label_indptr, label_at = positions(data.label_indptr)
    return data._replace(
        indptr=indptr,
        indices=data.indices[at],
        values=data.values[at],
        label_indptr=label_indptr,
        label_indices=data.label_indices[label_at],
    )


def write_xc(path: str | Path, data: SparseDataset) -> None:
    """Write a data set in the repository's text format. `read_xc` returns exactly the same.

    Raises:
      ValueError: rows do not fit the arrays.
    """
    num_points = len(data.indptr) - 1
    ends = (data.indptr[-1], data.indptr[-1], data.label_indptr[-1], num_points)
    sizes = (len(data.indices), len(data.values), len(data.label_indices))
    if ends != (*sizes, len(data.label_indptr) - 1):
        msg = (
            f"write_xc({str(path)!r}, data): indptr [{num_points + 1}] ends at {ends[0]} and "
            f"label_indptr [{len(data.label_indptr)}] at {ends[2]}, but there are {sizes[0]} "
            f"indices, {sizes[1]} values and {sizes[2]} label_indices."
        )
        raise ValueError(msg)
    # The shortest decimal that gives the same float32.
    pairs = [f"{i}:{v}" for i, v in zip(data.indices.tolist(), data.values.astype(str).tolist())]
    labels = list(map(str, data.label_indices.tolist()))
    starts, label_starts = data.indptr.tolist(), data.label_indptr.tolist()
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write(f"{num_points} {data.num_features} {data.num_labels}\n")
        for i in range(num_points):
            own = ",".join(labels[label_starts[i] : label_starts[i + 1]])
            file.write(f"{own} {' '.join(pairs[starts[i] : starts[i + 1]])}\n")


def pad_rows(
    indptr: Integer[np.ndarray, " N1"],
    indices: Integer[np.ndarray, " nnz"],
    values: Float[np.ndarray, " nnz"] | None,
    rows: Labels,
    width: int | np.integer,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Pad compressed rows to one width, for batches of a fixed shape. Nothing is dropped.

    `pad_rows(d.indptr, d.indices, d.values, rows, width, d.num_features)` returns features, and
    `pad_rows(d.label_indptr, d.label_indices, None, rows, width, d.num_labels)` returns labels. A
    padding id is past the end: JAX's gather with `mode="fill"` and scatter with `mode="drop"`
    ignore it.

    Args:
      indptr: `[N + 1]`, where rows start and end.
      indices: `[nonzeros]`, ids.
      values: `[nonzeros]`, the values of the ids; None: ones.
      rows: `[...]`, integers in `[0, N]`; N, past the end, is an empty row, as in `batches`.
      width: width of the result, K, the length of the longest row or more. The longest of all is
        `numpy.diff(indptr).max()`.
      pad_id: the padding id, the number of columns.

    Returns:
      `ids` `[..., K]`, int32, and `values` `[..., K]`, float32, 0 for padding.

    Raises:
      ValueError: a row is longer than the width or outside `[0, N]`, or pad_id is among the ids.
    """
    indptr, indices, rows = np.asarray(indptr), np.asarray(indices), np.asarray(rows)
    num_rows = len(indptr) - 1
    bad = rows[(rows < 0) | (rows > num_rows)]
    if bad.size:
        msg = f"pad_rows(rows=...): row {bad[0]} is outside [0, {num_rows}]."
        raise ValueError(msg)
    if indices.size and indices.max() >= pad_id:
        msg = (
            f"pad_rows(pad_id={pad_id}): the largest id is {indices.max()}; pass the number of "
            "columns."
        )
        raise ValueError(msg)
    counts = np.append(np.diff(indptr), 0)[rows]
    if counts.size and counts.max() > width:
        longest = rows.flat[counts.argmax()]
        msg = (
            f"pad_rows(width={width}): row {longest} has {counts.max()} ids; pass "
            f"width={counts.max()} or more, so that nothing is dropped."
        )
        raise ValueError(msg)
    filled = np.arange(width) < counts[..., None]
    ids = np.full(filled.shape, pad_id, np.int32)
    out = np.zeros(filled.shape, np.float32)
    at = (indptr[rows][..., None] + np.arange(width))[filled]
    ids[filled] = indices[at]
    out[filled] = 1 if values is None else np.asarray(values)[at]
    return ids, out
