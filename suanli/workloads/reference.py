"""The text form of a workload: what to build, and the options that it needs in another process.

`BASE?key=value&key=value`, with values as in a URL's query. The keys are `weights`, `data`,
`shapes` and `dtype`. A path that holds a question mark is taken as it is where no such key follows.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from suanli.base.errors import BadInputError

_KEYS = ("weights", "data", "shapes", "dtype")
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may stand behind the question mark.

    Attributes:
        weights: A safetensors file with absolute path, "none" for none at all, or "".
        data: Folder of the data, absolute, or "".
        shapes: One shape per input, without the batch, or ().
        dtype: torch's name of the inputs' type, or "".
    """

    weights: str = ""
    data: str = ""
    shapes: Shapes = ()
    dtype: str = ""

    @property
    def root(self) -> Path | None:
        """The data folder, if there is one."""
        return Path(self.data) if self.data else None


def parse(ref: str) -> tuple[str, Options]:
    """Take a reference apart.

    Raises:
        BadInputError: An option's value is wrong.
    """
    base, mark, query = ref.rpartition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    if not mark or not base or not pairs or any(key not in _KEYS for key, _ in pairs):
        return ref, Options()
    found = dict(pairs)
    return base, Options(
        weights=found.get("weights", ""),
        data=found.get("data", ""),
        shapes=parse_shapes(found.get("shapes", "")),
        dtype=found.get("dtype", ""),
    )


def write(base: str, options: Options) -> str:
    """The reference that `parse` takes apart again."""
    shapes = ",".join("x".join(str(size) for size in shape) for shape in options.shapes)
    values = {
        "weights": options.weights,
        "data": options.data,
        "shapes": shapes,
        "dtype": options.dtype,
    }
    query = urlencode({key: value for key, value in values.items() if value})
    return f"{base}?{query}" if query else base


def parse_shapes(text: str) -> Shapes:
    """`parse_shapes("3x224x224,128")` is ((3, 224, 224), (128,)).

    Raises:
        BadInputError: It is something else.
    """
    if not text:
        return ()
    try:
        shapes = tuple(
            tuple(int(size) for size in part.split("x"))
            for part in text.replace(" ", "").split(",")
        )
    except ValueError:
        shapes = ((0,),)
    if any(size < 1 for shape in shapes for size in shape):
        raise BadInputError(
            f"{text!r} is no list of input shapes", next_step="write them as 3x224x224,128"
        )
    return shapes
