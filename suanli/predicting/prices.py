"""Prices of cards by the hour, from a file of the user's."""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from suanli.base.errors import BadInputError
from suanli.devices import find_sheet, slug

# The dearest hour, and the longest name of a currency, that are taken for what they say.
_MOST, _LONGEST = 1e12, 12
_FORM = 'write lines such as "h100-sxm5-80gb" = 2.5 under [per_hour]'


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Money for one hour of one card.

    Attributes:
        currency: As the file says it; "" where it does not.
        per_hour: Card's name as it is typed -> price.
    """

    currency: str
    per_hour: dict[str, float]


def read_prices(path: Path) -> Prices:
    """Read a price file: TOML with `currency` and a table `per_hour` by card.

    Raises:
        BadInputError: It is absent or no such file, names an unknown card or one card twice, or a
            price is no number or negative.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also of numbers too long
        raise BadInputError(f"{path.name} is no price file: {error}", next_step=_FORM) from None
    table = data.get("per_hour")
    if not isinstance(table, dict) or not table:
        raise BadInputError(f"{path.name} has no prices", next_step=_FORM)
    per_hour: dict[str, float] = {}
    for name, price in table.items():
        card = slug(find_sheet(name))
        if card in per_hour:
            raise BadInputError(f"{path.name} has two prices of {card}")
        per_hour[card] = _price(path, name, price)
    currency = data.get("currency", "")
    if not isinstance(currency, str) or not currency.isprintable() or len(currency) > _LONGEST:
        raise BadInputError(f"{path.name}: the currency is no short word such as EUR")
    return Prices(currency=currency, per_hour=per_hour)


def _price(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise BadInputError(f"{path.name}: the price of {name} is no number", next_step=_FORM)
    if value < 0:
        raise BadInputError(f"{path.name}: the price of {name} is negative: {value:g}")
    if value > _MOST:
        raise BadInputError(f"{path.name}: the price of {name} is above {_MOST:g}: {value:g}")
    return abs(float(value))  # and no minus before a zero


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what floats hold
        return False
