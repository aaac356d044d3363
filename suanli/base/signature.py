"""What goes into a model and what comes out, without the model."""

from dataclasses import dataclass

from suanli.base.plan import Option


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a signature.

    Attributes:
        name: The parameter's or output's name, unique in its list.
        dtype: torch's name, such as "float32" or "int64".
        shape: Sizes; -1 stands for the batch, in one dimension at most.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def batched(self) -> bool:
        """Whether the first dimension is the batch."""
        return bool(self.shape) and self.shape[0] == -1


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A model's calling convention.

    The user's arguments are a tree (tuples, dictionaries, dataclasses). Backends see only the
    tree's tensors, flat, in order; `in_tree` and `out_tree` put the tree back.

    Attributes:
        max_batch: Largest batch the program takes.
        dynamic: Whether any batch from 1 to `max_batch` is taken, or only `max_batch`.
        in_tree: torch pytree specification (JSON text) of `(args, kwargs)`.
        out_tree: The same of the result.
        static_inputs: Leaf position -> value, for the leaves that are not tensors.
        static_outputs: The same for the result; None results stand here too.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    dynamic: bool
    in_tree: str
    out_tree: str
    static_inputs: dict[int, Option | None]
    static_outputs: dict[int, Option | None]
