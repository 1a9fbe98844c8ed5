"""Sizes as users write and read them: `103GiB`, `40GB`, with the unit always there."""

import re

from convert_step35.errors import OptionError, quoted

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size with a unit; OptionError without one."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise OptionError(f"bad size: expected a number with a unit such as 103GiB or 40GB, got {quoted(text)}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(n_bytes: int) -> str:
    """Bytes in the binary unit that leaves the fewest digits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} B"
