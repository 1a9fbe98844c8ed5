"""Numbers between two whole bounds, as a rule of a grammar. Pure."""

MAX_DIGITS = 16
MOST = 10**MAX_DIGITS - 1
FRACTION = '("." [0-9]{1,16})?'


def between(low: int, high: int, has_fraction: bool) -> str:
    """Returns the numbers from low to high, both included, without exponents.

    -MOST <= low <= high <= MOST.
    """
    branches = []
    if low < 0:
        nearest = max(0 if has_fraction else 1, -high)
        if nearest <= -low:
            branches.append(f'"-" {_unsigned(nearest, -low, has_fraction)}')
    if high >= 0:
        branches.append(_unsigned(max(low, 0), high, has_fraction))
    return _either(branches)


def _unsigned(low: int, high: int, has_fraction: bool) -> str:
    if not has_fraction:
        return _whole(low, high)
    below = [f"{_whole(low, high - 1)} {FRACTION}"] if low < high else []
    return _either([*below, f'"{high}" ("." "0"{{1,16}})?'])


def _whole(low: int, high: int) -> str:
    """Returns the whole numbers from low to high, 0 <= low <= high: one branch for each number of digits."""
    branches = []
    for n_digits in range(len(str(low)), len(str(high)) + 1):
        least, most = 10 ** (n_digits - 1) if n_digits > 1 else 0, 10**n_digits - 1
        branches.append(_same_length(str(max(low, least)), str(min(high, most))))
    return _either(branches)


def _same_length(low: str, high: str) -> str:
    """Returns the texts of digits from low to high, both of one length."""
    n = len(low)
    if low == high:
        return f'"{low}"'
    if low == "0" * n and high == "9" * n:
        return f"[0-9]{{{n}}}"
    if n == 1:
        return f"[{low}-{high}]"
    if low[0] == high[0]:
        return f'"{low[0]}" {_same_length(low[1:], high[1:])}'
    return _either(_by_first_digit(low, high))


def _by_first_digit(low: str, high: str) -> list[str]:
    n_more, first, last = len(low) - 1, int(low[0]), int(high[0])
    branches = []
    if low[1:] != "0" * n_more:
        branches.append(f'"{first}" {_same_length(low[1:], "9" * n_more)}')
        first += 1
    upper = []
    if high[1:] != "9" * n_more:
        upper.append(f'"{last}" {_same_length("0" * n_more, high[1:])}')
        last -= 1
    if first <= last:
        branches.append(f"[{first}-{last}] [0-9]{{{n_more}}}")
    return branches + upper


def _either(branches: list[str]) -> str:
    return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"
