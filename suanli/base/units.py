"""Numbers as people write them."""

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_IEC = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def si(value: float, unit: str, digits: int = 3) -> str:
    """`si(2.1e12, "FLOP/s")` is "2.1 TFLOP/s"."""
    for scale, prefix in _SI:
        if abs(value) >= scale:
            return f"{value / scale:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}"


def size(n_bytes: float) -> str:
    """`size(2**20)` is "1 MiB"."""
    for scale, unit in _IEC:
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def milliseconds(value: float) -> str:
    """`milliseconds(0.0123)` is "12.3 us"."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    if value >= 1:
        return f"{value:.3g} ms"
    return f"{value * 1000:.3g} us"


def percent(fraction: float, digits: int = 2) -> str:
    """`percent(0.9861)` is "98.61 %"."""
    return f"{fraction * 100:.{digits}f} %"
