"""The processor's own energy counter (RAPL), through Linux's powercap folders."""

from pathlib import Path


class PackageEnergy:
    """Joules of all packages together, on a counter that only grows.

    The hardware's counter wraps at `max_energy_range_uj`; a wrap between two readings is put
    right, more than one cannot be seen, so that readings should be less than a minute apart.

    Args:
        root: Where `sys` stands.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        # Only whole packages ("intel-rapl:0"): their parts ("intel-rapl:0:1") are inside them.
        self._zones = [
            zone
            for zone in sorted((root / "sys/class/powercap").glob("*-rapl:*"))
            if zone.name.count(":") == 1
        ]
        self._last: dict[Path, int] = {}
        self._total_uj = 0

    def joules(self) -> float | None:
        """Joules since an arbitrary start, or None if any package cannot be read.

        Modern kernels let only root read the counter, because it leaks what others compute.
        """
        if not self._zones:
            return None
        try:
            readings = {zone: int((zone / "energy_uj").read_text()) for zone in self._zones}
        except (OSError, ValueError):
            return None
        for zone, reading in readings.items():
            self._total_uj += self._grown(zone, reading)
        self._last = readings
        return self._total_uj * 1e-6

    def _grown(self, zone: Path, reading: int) -> int:
        before = self._last.get(zone)
        if before is None:
            return 0
        if reading >= before:
            return reading - before
        try:
            return reading - before + int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return 0
