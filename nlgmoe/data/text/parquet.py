"""The documents of a Parquet file. Row groups in front of the place to begin at are not read."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nlgmoe.data.text.bad_data import BadData, Unusable
from nlgmoe.data.text.records import Fields, FileOffset, Record, Shard, check, decode

ROWS = 64  # decoded at a time


def read_parquet(
    opened: Any, path: str, fields: Fields, bad: BadData, shard: Shard, start: FileOffset
) -> Iterator[Record]:
    """See `read_documents`; what is held at a time is a row group's bytes of two columns."""
    file = pq.ParquetFile(opened)
    known = file.schema_arrow.names
    if (column := fields.content.split(".")[0]) not in known:
        raise Unusable("no such column", f"{column}; there are {', '.join(known)}")
    columns = {name.split(".")[0] for name in (fields.content, fields.domain or fields.content)} & set(known)
    number = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number + rows <= start.documents:
            number += rows
            continue
        for batch in file.iter_batches(ROWS, [group], sorted(columns), use_threads=False):
            contents = _column(batch, fields.content)
            domains = _column(batch, fields.domain) if fields.domain is not None else None
            for row in range(batch.num_rows):
                if number >= start.documents and number in shard:
                    try:
                        domain = domains[row].as_py() if domains is not None else None
                        content = check(_value(contents[row], fields), fields)
                        yield Record(number, content, None if domain is None else str(domain), FileOffset(number + 1))
                    except Unusable as what:
                        bad.found(f"{path}, row {number + 1:,}", what.kind, what.details)
                    except UnicodeDecodeError:  # pyarrow does not check that text is UTF-8
                        bad.found(f"{path}, row {number + 1:,}", "not UTF-8")
                number += 1
    if number == 0:
        raise Unusable("empty file")


def _column(batch: pa.RecordBatch, name: str) -> Any:
    """A column by its dotted name; nulls where there is none."""
    first, *rest = name.split(".")
    if first not in batch.schema.names:
        return pa.nulls(batch.num_rows)
    column = batch.column(first)
    for part in rest:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
            return pa.nulls(batch.num_rows)
        column = pc.struct_field(column, part)
    return column


def _value(scalar: Any, fields: Fields) -> Any:
    """What a cell holds: text, an array of ids, or anything else."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
        return decode(scalar.as_buffer().to_pybytes(), fields)
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
        return scalar.values.to_numpy(zero_copy_only=False)
    return scalar.as_py()
