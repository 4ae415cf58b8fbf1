"""What an error says of the machine's limits: disk, memory and the size of files, however a library reports them."""

from __future__ import annotations

import errno
import re

__all__ = ["explain_limit"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain_limit(error: BaseException) -> str | None:
    """Return what limit of the machine ``error`` comes from, and what to do; None for any other error.

    >>> explain_limit(OSError(28, "No space left on device", "plan.json"))
    "the disk is full at 'plan.json' (No space left on device): free some space and run again"
    >>> explain_limit(ValueError("28")) is None
    True
    """
    said = " ".join(str(error).split())[:300]
    # safetensors passes on the number of the system's error in its message.
    number = getattr(error, "errno", None) or next((int(found) for found in re.findall(r"os error (\d+)", said)), None)
    reason, name = getattr(error, "strerror", None) or said, getattr(error, "filename", None)
    where = f" at {str(name)!r}" if name else ""
    # torch.save says only that the position in the file is not what it should be.
    if number in _FULL or "unexpected pos" in said or "PytorchStreamWriter failed writing" in said:
        return f"the disk is full{where} ({reason}): free some space and run again"
    if number == errno.EFBIG:
        return f"a file may not become so large{where} ({reason}): raise the limit, see `ulimit -f`, and run again"
    # Of torch: RuntimeError on a CPU, OutOfMemoryError on a GPU.
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or number == errno.ENOMEM or "can't allocate memory" in said:
        said = said or "MemoryError"
        return f"memory ran out ({said}): take smaller batches or a larger machine; --dry_run says what a run needs"
    return None
