"""Sizes as people write and read them: `22GiB`, `64 GB`, always with the unit."""

import re

from step35.errors import SettingsError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, what: str = "size") -> int:
    """Returns the bytes of a size; raises SettingsError without a unit."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise SettingsError(f"bad {what}: expected a number with a unit such as 22GiB or 64GB, got {text!r}")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def format_size(n_bytes: int) -> str:
    """Returns GiB with two digits, or MiB below a tenth of one."""
    if abs(n_bytes) >= 2**30 // 10:
        return f"{n_bytes / 2**30:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def exact_size(n_bytes: int) -> str:
    """Returns a size that parse_size turns into the very same bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes % size == 0:
            return f"{n_bytes // size}{unit}"
    return f"{n_bytes // 1000}.{n_bytes % 1000:03}KB"
