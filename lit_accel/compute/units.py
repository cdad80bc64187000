"""Numbers for people: the prefix that fits, and durations."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def prefix_for(value: float) -> tuple[str, float]:
    """Choose the SI prefix that leaves one to three digits before the point.

    Args:
        value: The largest of the values that will share the prefix.

    Returns:
        The prefix and what to divide by, such as ``("T", 1e12)``.
    """
    index = 0
    # 999.5 would be printed as 1000.
    while abs(value) >= 999.5 * 1000**index and index < len(_PREFIXES) - 1:
        index += 1
    return _PREFIXES[index], float(1000**index)


def with_prefix(value: float) -> str:
    """Write a number with up to three digits and a prefix, such as ``124M`` or ``1.5k``."""
    prefix, divisor = prefix_for(value)
    return f"{value / divisor:.3g}{prefix}"


def duration(seconds: float) -> str:
    """Write a duration, such as ``12.3 s`` or ``1:02:05``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def time_unit(longest: float) -> tuple[str, float]:
    """Return the unit in which seconds up to a number are easy to read, and how many seconds it has.

    Args:
        longest: The largest of them.
    """
    if longest < 120:
        return "s", 1.0
    return ("min", 60.0) if longest < 7200 else ("h", 3600.0)
