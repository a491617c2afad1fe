"""The rows of a .parquet, with pyarrow, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from polyglot_jax.config import InputError
from polyglot_jax.prepare.readers import MissingLibrary, ReaderConfig, Row, find_column

BATCH = 1024


def parquet_rows(path: Path, config: ReaderConfig) -> Iterator[Row]:
    """Rows of the file `path`, numbered from 1; a null is an empty row.

    Raises InputError when pyarrow is not installed, the file is damaged, or its column of text is missing or no text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingLibrary(
            f"{path}: reading .parquet needs pyarrow; pip install -r requirements-corpus.txt"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            column = find_column(path, file.schema_arrow.names, config)
            kind = file.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputError(f"{path}: column {column!r} is not text but {kind}; name another with --column")
            number = 0
            for batch in file.iter_batches(BATCH, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    try:
                        yield Row(number, value.as_py() or "")
                    except UnicodeDecodeError as error:
                        yield Row(number, problem="encoding", reason=f"not UTF-8: {error}")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged or no parquet ({error}); copy or make it again") from error
