"""Units of measurement as answers spell them, so that 180 cm is 1.8 m and is not 180 m."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one unit measures and how much of it."""

    dimension: str
    """Two units can be compared if this is the same; `length^2`, `length/time`."""
    factor: Fraction
    """How many of the dimension's base unit it is."""

    def per(self, other: "Unit") -> "Unit":
        """This unit divided by another."""
        return Unit(f"{self.dimension}/{other.dimension}", self.factor / other.factor)


# Dimension -> names of a unit, the first plurals by s or es -> how many of the base unit. Symbols keep their case.
_INCH: Final = Fraction("0.0254")
_TABLE: Final[Mapping[str, Mapping[str, Fraction | int]]] = {
    "length": {
        "mm millimeter millimetre": Fraction(1, 1000),
        "cm centimeter centimetre": Fraction(1, 100),
        "dm decimeter decimetre": Fraction(1, 10),
        "m meter metre": 1,
        "km kilometer kilometre": 1000,
        "in inch": _INCH,
        "ft foot feet": 12 * _INCH,
        "yd yard": 36 * _INCH,
        "mi mile": 63360 * _INCH,
    },
    "mass": {
        "mg milligram": Fraction(1, 1_000_000),
        "g gram gm": Fraction(1, 1000),
        "kg kilogram kilo": 1,
        "tonne": 1000,
        "oz ounce": Fraction("0.45359237") / 16,
        "lb pound": Fraction("0.45359237"),
    },
    "time": {
        "ms millisecond": Fraction(1, 1000),
        "s second sec": 1,
        "min minute": 60,
        "h hour hr": 3600,
        "d day": 86400,
        "week": 7 * 86400,
    },
    "month": {"month": 1, "year yr": 12, "decade": 120, "century centurie": 1200},
    "length^3": {
        "mL ml milliliter millilitre cc": Fraction(1, 1_000_000),
        "cL cl centiliter centilitre": Fraction(1, 100_000),
        "dL dl deciliter decilitre": Fraction(1, 10_000),
        "L l liter litre": Fraction(1, 1000),
        "gal gallon": 231 * _INCH**3,
        "quart": 231 * _INCH**3 / 4,
        "pint": 231 * _INCH**3 / 8,
        "cup": 231 * _INCH**3 / 16,
    },
    "length^2": {"acre": 43560 * (12 * _INCH) ** 2, "ha hectare": 10_000},
    "length/time": {
        "mph": 63360 * _INCH / 3600,
        "kph kmh kmph": Fraction(1000, 3600),
    },
    "angle": {"° degree deg": 1},
    "angle in radians": {"rad radian": 1},
    "temperature in °C": {"°C celsius": 1},
    "temperature in °F": {"°F fahrenheit": 1},
    "dollars": {"$ dollar buck usd USD": 1, "¢ cent": Fraction(1, 100)},
    "euros": {"€ euro EUR": 1},
    "sterling": {"£ GBP": 1},
    "yen": {"¥ yen yuan RMB CNY JPY": 1},
    "rupees": {"₹ rupee rs Rs INR": 1},
    "energy": {"J joule": 1, "kJ kilojoule": 1000},
    "force": {"N newton": 1},
    "power": {"W watt": 1, "kW kilowatt": 1000},
    "voltage": {"V volt": 1},
    "frequency": {"Hz hertz": 1, "kHz kilohertz": 1000},
    "time before noon": {"am a.m": 1},
    "time after noon": {"pm p.m": 1},
    "share": {"% percent percentage pct": Fraction(1, 100)},
}
_NAMES: Final = {
    name: Unit(dimension, Fraction(factor))
    for dimension, units in _TABLE.items()
    for names, factor in units.items()
    for name in names.split()
}
_ONE: Final = re.compile(
    r"(?P<before>square|sq\.?|cubic|cu\.?)?\s*(?P<name>[^\W\d_]+|[°$€£¥₹¢%][CF]?|[ap]\.m)\.?"
    r"\s*(?:\^\{?(?P<power>[23])\}?|(?P<after>squared|cubed))?"
)
_POWERS: Final = {"sq": 2, "cu": 3, "2": 2, "3": 3}


@functools.lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit | None:
    """The unit that a text such as `cm`, `square feet`, `m^2`, `km/h` or `miles per hour` names; None for others."""
    parts = [_parse_one(part.strip()) for part in re.split(r"/|\bper\b", text)]
    whole = parts[0]
    for part in parts[1:]:
        if whole is None or part is None:
            return None
        whole = whole.per(part)
    return whole


def _parse_one(text: str) -> Unit | None:
    match = _ONE.fullmatch(text)
    if match is None:
        return None
    unit = _named(match["name"])
    power = _POWERS.get(match["power"] or (match["before"] or match["after"] or "")[:2], 1)
    if unit is None or power == 1:
        return unit
    return Unit(f"{unit.dimension}^{power}", unit.factor**power)


def _named(name: str) -> Unit | None:
    if len(name) <= 2 and name in _NAMES:
        return _NAMES[name]
    for spelling in (name, name.lower(), name.lower().removesuffix("s"), name.lower().removesuffix("es")):
        # A symbol of one letter is that letter: s is seconds, S is not, and ms is not several metres.
        if spelling in _NAMES and (len(spelling) > 1 or not spelling.isalpha() or spelling == name):
            return _NAMES[spelling]
    return None
