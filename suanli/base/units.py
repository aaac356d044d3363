"""Numbers as people write them."""

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_IEC = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def si(value: float, unit: str, digits: int = 3) -> str:
    """`si(2.1e12, "FLOP/s")` is "2.1 TFLOP/s"."""
    value = _rounded(value, digits)
    for scale, prefix in _SI:
        if abs(value) >= scale:
            return f"{_plain(value / scale, digits)} {prefix}{unit}"
    return f"{_plain(value, digits)} {unit}"


def size(n_bytes: float) -> str:
    """`size(2**20)` is "1 MiB"."""
    for scale, unit in _IEC:
        if n_bytes >= scale:
            return f"{_plain(n_bytes / scale, 3)} {unit}"
    return f"{n_bytes:.0f} B"


def milliseconds(value: float) -> str:
    """`milliseconds(0.0123)` is "12.3 us"."""
    value = _rounded(value, 3)
    if value >= 1000:
        return f"{_plain(value / 1000, 3)} s"
    if value >= 1:
        return f"{_plain(value, 3)} ms"
    return f"{_plain(value * 1000, 3)} us"


def rate(per_s: float) -> str:
    """`rate(12345.6)` is "12,346"; below ten three digits are kept."""
    return f"{per_s:,.0f}" if per_s >= 10 else _plain(per_s, 3)


def percent(fraction: float, digits: int = 2) -> str:
    """`percent(0.9861)` is "98.61 %"."""
    return f"{fraction * 100:.{digits}f} %"


def share(fraction: float) -> str:
    """`share(0.4312)` is "43 %", `share(0.00431)` is "0.43 %": two digits that say something."""
    return f"{_plain(fraction * 100, 2)} %"


def _rounded(value: float, digits: int) -> float:
    """To so many significant digits first, so that 999.9 becomes 1 of the next unit."""
    return float(f"{value:.{digits}g}")


def _plain(value: float, digits: int) -> str:
    """So many significant digits, all of the integer part, never an exponent above one."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text
