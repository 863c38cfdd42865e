"""Sets that TensorFlow Datasets has prepared: where they are, and whether files are damaged."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def folder_of(name: str, data_dir: str | None) -> Path:
    """The folder of a set: in `data_dir`, else in `TFDS_DATA_DIR`, else in TFDS's default."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir or default).expanduser() / name


def how_to_prepare(name: str, data_dir: str | None, needs: str = "TensorFlow") -> str:
    """The command that prepares a set; it needs the packages `needs`."""
    return (
        f'With network and {needs}, once: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir={data_dir!r}, file_format='array_record')"
        '.download_and_prepare()"; or set TFDS_DATA_DIR to where it is.'
    )


def one_line(error: BaseException) -> str:
    """Type and text of another library's error, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"


class Shards(NamedTuple):
    """The array_record files of one split.

    Attributes:
      call: the function that the user called, for messages.
      folder: the folder of the files.
      lengths: number of records per file, according to dataset_info.json.
      cure: how to prepare the set.
    """

    call: str
    folder: str | Path
    lengths: dict[Path, int]
    cure: str

    def check(self) -> None:
        """Check that every file exists, is an array_record, and has all records.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file is damaged, or cannot be read.
        """
        for file, length in self.lengths.items():
            if not os.path.lexists(file):
                msg = f"{self.call}: {file} is missing. {self._again()}"
                raise FileNotFoundError(msg)
            count = self._read(file, lambda reader: reader.num_records())
            if count != length:
                msg = (
                    f"{self.call}: {file} has {count} records, but dataset_info.json "
                    f"says {length}. {self._again()}"
                )
                raise ValueError(msg)

    def blame(self, error: Exception) -> ValueError:
        """The error to raise if records cannot be decoded; a file that cannot be read is named.

        Raises:
          ValueError: a file is damaged.
        """
        for file in self.lengths:
            self._read(file, lambda reader: reader.read_all())
        msg = (
            f"{self.call}: a record in {self.folder} does not have the features of the set "
            f"({one_line(error)}). {self._again()}"
        )
        return ValueError(msg)

    def _read(self, file: Any, get: Callable[..., Any]):
        import array_record.python.array_record_module as array_record_module

        try:
            reader = array_record_module.ArrayRecordReader(str(file))
            try:
                return get(reader)
            finally:
                reader.close()
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            msg = f"{self.call}: {file} cannot be read ({one_line(error)}). {self._again()}"
            raise ValueError(msg) from error

    def _again(self):
        return f"Copy it again, or delete {self.folder} and prepare the set again. {self.cure}"


def unprepared(call: str, folder: str | Path, cure: str) -> FileNotFoundError:
    """The error to raise if a set does not exist."""
    msg = f"{call}: not prepared as array_record in {folder}, or not readable by this user. {cure}"
    return FileNotFoundError(msg)


def unreadable(call: str, folder: Path, error: BaseException, cure: str) -> ValueError:
    """The error to raise if the metadata of a set cannot be read; it names the file.

    Args:
      call: the function that the user called.
      folder: folder of the set or of its version.
      error: the error that reading raised.
      cure: how to prepare the set.
    """
    infos = [str(f) for f in sorted(folder.rglob("dataset_info.json"))]
    where = " or ".join(infos) or f"what is in {folder}"
    msg = (
        f"{call}: {where}, or a file beside it, cannot be read ({one_line(error)}). Copy these "
        f"files again, or delete their folder and prepare the set again. {cure}"
    )
    return ValueError(msg)
