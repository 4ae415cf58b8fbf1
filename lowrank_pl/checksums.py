"""A checksum of the tensors in a safetensors file, kept in its header, so that no flipped bit is read unseen."""

from __future__ import annotations

import mmap
import re
import zlib
from pathlib import Path

__all__ = ["KEY", "UNKNOWN", "DamagedError", "check_whole", "with_checksum"]

KEY = "crc32"
"""What the checksum is called among the file's metadata."""
UNKNOWN = "00000000"
"""What stands there until it is known."""


class DamagedError(Exception):
    """A file's bytes are not those that were written."""


def with_checksum(data: bytes) -> bytes:
    """Return a safetensors file with the checksum of its tensors in the place of the one not known."""
    header = _header_bytes(data)
    known = f"{zlib.crc32(memoryview(data)[header:]):08x}"
    old, new = (f'"{KEY}":"{value}"'.encode() for value in (UNKNOWN, known))
    assert data[:header].count(old) == 1
    return data[:header].replace(old, new) + data[header:]


def check_whole(path: Path) -> None:
    """Compare the tensors of a file with their checksum: a flipped bit would be read without a word.

    Files of versions that wrote none are taken as they are.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: They differ, or the file is empty.
    """
    if not path.stat().st_size:
        raise DamagedError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _header_bytes(data)
        found = re.search(rb'"%b":"([0-9a-f]{8})"' % KEY.encode(), data[:header])
        with memoryview(data) as view:
            if found and int(found[1], 16) != zlib.crc32(view[header:]):
                raise DamagedError("the checksum of its tensors is wrong")


def _header_bytes(data: bytes | mmap.mmap) -> int:
    # A safetensors file begins with the length of its header, which is JSON; all else is tensors.
    return 8 + int.from_bytes(data[:8], "little")
