"""What is written is read again, fast and slow reading agree, and every damage has its line."""

import pathlib

import numpy as np
import pytest

from psjax import data
from psjax.data import _sparse

BIBTEX = pathlib.Path(__file__).parents[3] / "shared" / "xc" / "Bibtex"
SMALL = b"""3 5 4
2,0 0:1.5 4:-2e-3
 1:1 3:.5
1 2:7
"""


def write(tmp_path, text, name="small.txt"):
    (tmp_path / name).write_bytes(text)
    return tmp_path / name


def equal_arrays(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def equal(a, b):
    assert (a.num_features, a.num_labels) == (b.num_features, b.num_labels)
    equal_arrays(a[:5], b[:5])


def random_data(seed, num_points=60, num_features=300, num_labels=40):
    rng = np.random.default_rng(seed)
    counts, label_counts = rng.integers(0, 9, (2, num_points))
    rows = lambda counts, size: [rng.permutation(size)[:c].astype(np.int32) for c in counts]
    indptr = lambda counts: np.concatenate([[0], np.cumsum(counts)])
    values = rng.normal(size=counts.sum()) * 10.0 ** rng.integers(-30, 30, counts.sum())
    return data.SparseDataset(
        indptr(counts),
        np.concatenate(rows(counts, num_features)),
        values.astype(np.float32),
        indptr(label_counts),
        np.concatenate(rows(label_counts, num_labels)),
        num_features,
        num_labels,
    )


def test_a_small_file_is_its_lines(tmp_path):
    got = data.read_xc(write(tmp_path, SMALL))
    assert got.indptr.tolist() == [0, 2, 4, 5]
    assert got.indices.tolist() == [0, 4, 1, 3, 2]
    np.testing.assert_array_equal(got.values, np.array([1.5, -2e-3, 1, 0.5, 7], np.float32))
    assert got.label_indptr.tolist() == [0, 2, 2, 3]
    assert got.label_indices.tolist() == [2, 0, 1]
    assert (got.num_features, got.num_labels) == (5, 4)
    dtypes = [np.int64, np.int32, np.float32, np.int64, np.int32]
    assert [x.dtype for x in got[:5]] == dtypes


@pytest.mark.parametrize("block", [1, 50, 1 << 24])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_read_again_bit_for_bit(seed, block, tmp_path, monkeypatch):
    monkeypatch.setattr(_sparse, "_BLOCK", block)
    want = random_data(seed)
    data.write_xc(tmp_path / "a.txt", want)
    equal(data.read_xc(tmp_path / "a.txt"), want)


@pytest.mark.parametrize("seed", range(3))
def test_reading_by_arrays_is_reading_line_by_line(seed, tmp_path, monkeypatch):
    data.write_xc(tmp_path / "a.txt", random_data(seed))
    block = (tmp_path / "a.txt").read_bytes().split(b"\n", 1)[1]
    fast, slow = _sparse._parse_block(block, 300, 40), _sparse._parse_lines(block, 300, 40, "", 2)
    assert fast is not None
    equal_arrays(fast, slow)


def test_neither_reader_accepts_what_the_other_does_not():
    """Every file that differs from a good one in one character."""
    good = b"2,0 0:1.5 4:2\n 1:1\n"
    for place in range(len(good) + 1):
        for cut in (0, 1):
            for new in (b"", *(bytes([c]) for c in b" ,:\n09.-+eEnx_\t\r\x00")):
                block = good[:place] + new + good[place + cut :]
                if not block.endswith(b"\n"):
                    continue
                fast = _sparse._parse_block(block, 5, 4)
                try:
                    slow = _sparse._parse_lines(block, 5, 4, "", 2)
                except ValueError:
                    assert fast is None, block
                    continue
                if fast is not None:
                    for x, y in zip(fast, slow):
                        np.testing.assert_array_equal(x, y, err_msg=repr(block))


@pytest.mark.parametrize(("old", "new"), [(b"\n", b"\r\n"), (b"2:7\n", b" 2:7 \n")])
def test_other_ends_of_lines_and_more_blanks_are_read(old, new, tmp_path):
    want = data.read_xc(write(tmp_path, SMALL))
    equal(data.read_xc(write(tmp_path, SMALL.replace(old, new))), want)


@pytest.mark.parametrize(
    ("text", "indptr", "label_indptr"),
    [
        (b"2 5 4\n3\n \n", [0, 0, 0], [0, 1, 1]),  # labels only, and nothing at all
        (b"0 5 4\n", [0], [0]),
    ],
)
def test_points_may_be_empty_and_files_too(text, indptr, label_indptr, tmp_path):
    got = data.read_xc(write(tmp_path, text))
    assert got.indptr.tolist() == indptr
    assert got.label_indptr.tolist() == label_indptr


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"3 5 4\n", b"3 5\n", "line 1 is '3 5'; the header is 'num_points"),
        (b"3 5 4\n", b"", "line 1 is '2,0 0:1.5 4:-2e-3'"),
        (b"3 5 4\n", b"4 5 4\n", "line 4 is the last, that is 3 points; the header says 4"),
        (b"3 5 4\n", b"2 5 4\n", "line 4 is one too many: the header says 2"),
        (b"4:-2e-3", b"5:1", r"line 2: feature 5 is outside \[0, 5\)"),
        (b"4:-2e-3", b"-1:1", "line 2: feature '-1' is not an integer"),
        (b"2,0", b"2,4", r"line 2: label 4 is outside \[0, 4\)"),
        (b"2,0", b"2,", "line 2: label '' is not an integer"),
        (b"2,0", b"2.0", "line 2: label '2.0' is not an integer"),
        (b"1 2:7", b"1 2", "line 4: '2' is not 'feature:value'"),
        (b"1 2:7", b"1 2:", "line 4: '2:' is not 'feature:value'"),
        (b"1 2:7", b"2:7", "line 4: label '2:7' is not an integer"),
        (b"1 2:7", b"1 2:7x", "line 4: '2:7x' is not 'feature:value'"),
        (b"1 2:7", b"1 2:3:7", "line 4: '2:3:7' is not 'feature:value'"),
        (b"1 2:7", b"1\t2:7", r"line 4: label '1\\t2:7' is not an integer"),
        (b"1 2:7", b"", "line 4: is empty"),
        (b"3:.5", b"3:nan", "line 3: value 'nan' of feature 3 is not finite"),
        (b"3:.5", b"3:-inf", "line 3: value '-inf' of feature 3 is not finite"),
        (b"3:.5", b"3:1e39", "line 3: value '1e39' of feature 3 is not finite in float32"),
        (b"3:.5", b"1:.5", "line 3: feature 1 is repeated"),
        (b"2,0", b"2,0,2", "line 2: label 2 is repeated"),
        (b"2:7\n", b"2:7", "line 4 is cut off: it has no newline"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_each_damage_is_named_with_its_line(old, new, match, block, tmp_path, monkeypatch):
    monkeypatch.setattr(_sparse, "_BLOCK", block)
    assert SMALL.count(old) == 1
    with pytest.raises(ValueError, match=r"read_xc\('.*small.txt'\): " + match):
        data.read_xc(write(tmp_path, SMALL.replace(old, new)))


@pytest.mark.parametrize(
    "digits", [str(2**31), str(2**32 + 7), str(2**63), "1" + "0" * 5000], ids=lambda d: d[:20]
)
@pytest.mark.parametrize(("what", "columns"), [("feature", 10**18 - 1), ("label", 2**40)])
def test_an_id_that_does_not_fit_is_named_with_its_line(digits, what, columns, tmp_path):
    labels, features = (columns, 5) if what == "label" else (4, columns)
    line = f"{digits} 1:1" if what == "label" else f"1 2:7 {digits}:1"
    path = write(tmp_path, f"2 {features} {labels}\n 1:1\n{line}\n".encode())
    shown = digits if len(digits) < 40 else "1000"
    with pytest.raises(ValueError, match=rf"read_xc\('.*small.txt'\): line 3: {what} {shown}.* is"):
        data.read_xc(path)


def test_the_largest_id_that_fits_is_read(tmp_path):
    path = write(tmp_path, b"1 2147483648 2147483648\n2147483647,0 2147483647:1 3:2\n")
    got = data.read_xc(path)
    assert got.indices.tolist() == [2**31 - 1, 3]
    assert got.label_indices.tolist() == [2**31 - 1, 0]


@pytest.mark.parametrize("place", range(3))
def test_a_header_that_no_file_can_have_is_named(place, tmp_path):
    header = ["1", "5", "4"]
    header[place] = "9" * 5000
    path = write(tmp_path, " ".join(header).encode() + b"\n 1:1\n")
    with pytest.raises(ValueError, match="line 1 is .* must have 18 digits or fewer"):
        data.read_xc(path)


def test_a_column_of_a_split_file_is_the_points_in_its_order(tmp_path):
    whole = data.read_xc(write(tmp_path, SMALL))
    split = write(tmp_path, b"3 1\n1 2\n", "split.txt")
    got = data.read_xc(tmp_path / "small.txt", split, column=0)
    assert got.indptr.tolist() == [0, 1, 3]
    assert got.indices.tolist() == [2, 0, 4]
    assert got.values.tolist() == whole.values[[4, 0, 1]].tolist()
    assert got.label_indptr.tolist() == [0, 1, 3]
    assert got.label_indices.tolist() == [1, 2, 0]
    got = data.read_xc(tmp_path / "small.txt", split, column=1)
    assert got.label_indptr.tolist() == [0, 2, 2]
    one = write(tmp_path, b"1\r\n2\r\n3\r\n", "one.txt")
    equal(data.read_xc(tmp_path / "small.txt", one), whole)


@pytest.mark.parametrize(
    ("text", "column", "match"),
    [
        (b"1 2\n", None, "line 1 has 2 columns; pass column=0"),
        (b"1 2\n3\n", 1, "line 2 has 1 columns, counted from 0"),
        (b"1\n", -1, "line 1 has 1 columns, counted from 0"),
        (b"1\n0\n", None, r"line 2: '0' is not an integer in \[1, 3\]"),
        (b"1\n4\n", None, r"line 2: '4' is not an integer in \[1, 3\]"),
        (b"1\n1.0\n", None, "line 2: '1.0' is not an integer"),
        (b"1\n" + b"9" * 5000, None, "line 2: '9999.* is not an integer"),
        (b"2\n1\n2\n", None, "line 3: point 2 is in line 1 too"),
    ],
)
def test_a_bad_split_file_is_named(text, column, match, tmp_path):
    write(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"split_file='.*split.txt', column=.*\): " + match):
        data.read_xc(tmp_path / "small.txt", write(tmp_path, text, "split.txt"), column)


def test_padded_rows_hold_every_entry_once():
    d = random_data(5)
    width = np.diff(d.indptr).max()
    rows = np.array([[3, 60, 0], [59, 3, 7]])  # 60 is past the end: an empty slot of a batch
    ids, values = data.pad_rows(d.indptr, d.indices, d.values, rows, width, d.num_features)
    assert ids.shape == values.shape == (2, 3, width)
    assert (ids.dtype, values.dtype) == (np.int32, np.float32)
    for at, row in np.ndenumerate(rows):
        own = slice(d.indptr[row], d.indptr[row + 1]) if row < 60 else slice(0)
        count = len(d.indices[own])
        np.testing.assert_array_equal(ids[at][:count], d.indices[own])
        np.testing.assert_array_equal(values[at][:count], d.values[own])
        assert (ids[at][count:] == d.num_features).all()
        assert not values[at][count:].any()
    labels, ones = data.pad_rows(d.label_indptr, d.label_indices, None, rows[0], 8, d.num_labels)
    np.testing.assert_array_equal(ones, labels < d.num_labels)
    assert ones.sum() == sum(np.diff(d.label_indptr)[[3, 0]])


FULLEST = int(np.diff(random_data(5).indptr).argmax())
MOST = int(np.diff(random_data(5).indptr).max())


@pytest.mark.parametrize(
    ("rows", "width", "pad_id", "match"),
    [
        ([0, FULLEST], MOST - 1, 300, f"row {FULLEST} has {MOST} ids; pass width=.* droppe"),
        ([61], 9, 300, r"row 61 is outside \[0, 60\]"),
        ([1], 9, 40, r"pad_id=40\): the largest id is"),
    ],
)
def test_pad_rows_drops_nothing_in_silence(rows, width, pad_id, match):
    d = random_data(5)
    with pytest.raises(ValueError, match=match):
        data.pad_rows(d.indptr, d.indices, d.values, rows, width, pad_id)


def test_arrays_that_do_not_fit_are_not_written():
    d = random_data(5)
    with pytest.raises(ValueError, match=r"write_xc.*indptr \[60\] ends at"):
        data.write_xc("unwritten", d._replace(indptr=d.indptr[:-1]))


def test_bibtex_is_what_the_repository_says(tmp_path):
    if not BIBTEX.is_dir():
        pytest.skip("Bibtex is not next to the repository")
    train, test = (data.read_xc(BIBTEX / f"{name}.txt") for name in ("train", "test"))
    for got, points in ((train, 4880), (test, 2515)):
        assert len(got.indptr) == len(got.label_indptr) == points + 1
        assert (got.num_features, got.num_labels) == (1836, 159)
        assert (got.values == 1).all()
    # The repository counts 2.40 labels a point, 111.71 points a label, over train and test.
    ones = len(train.label_indices) + len(test.label_indices)
    assert round(ones / 7395, 2) == 2.40
    assert round(ones / 159, 2) == 111.71
    # One file of all points and the split files give the same again.
    bodies = [(BIBTEX / f"{n}.txt").read_bytes().split(b"\n", 1)[1] for n in ("train", "test")]
    whole = write(tmp_path, b"7395 1836 159\n" + b"".join(bodies))
    equal(data.read_xc(whole, BIBTEX / "bibtex_trSplit.txt"), train)
    equal(data.read_xc(whole, BIBTEX / "bibtex_tstSplit.txt", column=0), test)
