"""The model's own calling convention over an engine's flat tensors, cheap enough for every call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.signature import Signature
from suanli.engines.program import check_inputs, flatten_call, register_known_trees


class Convention:
    """Puts calls into the captured form and results back into the user's.

    `flatten_call` and `unflatten_result` of the program say the same, but read the trees' text at
    each call, which costs more than a small model's whole step.

    Attributes:
        flat_call: Whether a call by position is the flat inputs as they are.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        register_known_trees(signature.in_tree)
        register_known_trees(signature.out_tree)
        self._in_tree = _tree(signature.in_tree)
        self._out_tree = _tree(signature.out_tree)
        args, kwargs = _children(self._in_tree)
        self._keywords = tuple(kwargs.context) if kwargs.context else ()
        self._positional = args.num_children
        self._slot_names = self._names_of_slots(args)
        self._rebuild = _rebuilder(self._out_tree) if not signature.static_outputs else None
        self.flat_call = (
            not self._keywords
            and not signature.static_inputs
            and all(slot.is_leaf() for slot in _children(args))
        )
        self._expected = [
            (getattr(torch, spec.dtype), spec.shape[1:] if spec.batched else spec.shape, spec)
            for spec in signature.inputs
        ]

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call that are inputs, in the signature's order, shapes not yet checked.

        Arguments may be given by keyword where the captured call gave them by position, and
        keywords in any order.

        Raises:
            ArtefactError: The call has other arguments than the captured one.
        """
        if (
            self.flat_call
            and not kwargs
            and len(args) == self._positional
            and all(isinstance(argument, torch.Tensor) for argument in args)
        ):
            return list(args)
        args, kwargs = self._reordered(args, kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        if tree != self._in_tree or self.signature.static_inputs:
            return list(flatten_call(self.signature, args, kwargs))  # its errors are the clear ones
        return leaves

    def unflatten(self, flat: list[torch.Tensor]) -> Any:
        """The user's result from the flat outputs."""
        if self._rebuild is not None:
            return self._rebuild(flat)
        tensors = iter(flat)
        static = self.signature.static_outputs
        leaves = [
            static[i] if i in static else next(tensors) for i in range(self._out_tree.num_leaves)
        ]
        return pytree.tree_unflatten(leaves, self._out_tree)

    def batch_of(self, flat: Sequence[Any]) -> int:
        """The batch size of flat inputs.

        Raises:
            ArtefactError: A number, dtype or shape is wrong, or the program is of one fixed batch
                and this is another.
        """
        batch = self._batch_at_a_glance(flat)
        if batch is None:
            batch = check_inputs(self.signature, flat)  # its errors are the clear ones
        if not self.signature.dynamic and batch != self.signature.max_batch:
            raise ArtefactError(
                f"this engine takes exactly {self.signature.max_batch} samples, {batch} were given"
            )
        return batch

    def _batch_at_a_glance(self, flat: Sequence[Any]) -> int | None:
        """What `check_inputs` gives, or None where anything is not plainly right."""
        if len(flat) != len(self._expected):
            return None
        batch = -1
        for tensor, (dtype, tail, spec) in zip(flat, self._expected, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype is not dtype:
                return None
            shape = tensor.shape
            if not spec.batched:
                if shape != tail:
                    return None
            elif not shape or shape[1:] != tail or batch not in (-1, shape[0]):
                return None
            else:
                batch = shape[0]
        return int(batch) if batch >= 0 else self.signature.max_batch

    def empty_result(self) -> list[torch.Tensor]:
        """Flat outputs for a batch of no samples.

        Raises:
            BadInputError: An output does not depend on the batch, so it has no value.
        """
        self._all_outputs_batched("a batch of no samples")
        return [
            torch.empty((0, *spec.shape[1:]), dtype=getattr(torch, spec.dtype))
            for spec in self.signature.outputs
        ]

    def split(self, flat: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[list[torch.Tensor]]:
        """Flat inputs in parts of the given numbers of samples.

        Raises:
            BadInputError: The parts' results could not be put together again.
        """
        self._all_outputs_batched(f"more than {self.signature.max_batch} samples")
        columns = [
            torch.split(tensor, list(sizes)) if spec.batched else [tensor] * len(sizes)
            for spec, tensor in zip(self.signature.inputs, flat, strict=True)
        ]
        return [list(part) for part in zip(*columns, strict=True)]

    def _all_outputs_batched(self, what: str) -> None:
        for spec in self.signature.outputs:
            if not spec.batched:
                raise BadInputError(f"{what} cannot be served: {spec.name} is one for a whole call")

    def _reordered(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not kwargs and len(args) == self._positional:
            return args, kwargs
        kwargs = dict(kwargs)
        for name in self._slot_names[len(args) :]:
            if name in kwargs and name not in self._keywords:
                args = (*args, kwargs.pop(name))
        if kwargs.keys() == set(self._keywords):
            kwargs = {name: kwargs[name] for name in self._keywords}
        return args, kwargs

    def _names_of_slots(self, args: pytree.TreeSpec) -> list[str]:
        """The parameter's name per positional argument; "" where it is not one tensor."""
        names, leaf = [], 0
        tensors = iter(self.signature.inputs)
        for slot in _children(args):
            inside = range(leaf, leaf + slot.num_leaves)
            specs = [next(tensors) for i in inside if i not in self.signature.static_inputs]
            names.append(specs[0].name if slot.is_leaf() and specs else "")
            leaf += slot.num_leaves
        return names


def _children(tree: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    # a method in newer versions of torch, where the attribute of the older ones warns
    return tree.children() if hasattr(tree, "children") else list(tree.children_specs)


def _rebuilder(tree: pytree.TreeSpec) -> Callable[[list[torch.Tensor]], Any]:
    """Puts flat outputs into a tree; the commonest trees without a walk."""
    children = _children(tree)
    if tree.is_leaf():
        return lambda flat: flat[0]
    if all(child.is_leaf() for child in children):
        if tree.type is tuple:
            return tuple
        if tree.type is list:
            return list
        if tree.type is dict:
            keys = list(tree.context)
            return lambda flat: dict(zip(keys, flat, strict=True))
    return lambda flat: pytree.tree_unflatten(flat, tree)


def _tree(text: str) -> pytree.TreeSpec:
    try:
        return pytree.treespec_loads(text)
    except Exception as error:  # the reader raises whatever the broken part makes it raise
        raise ArtefactError(
            f"the calling convention cannot be read here: {str(error).splitlines()[0][:200]}",
            next_step="the model's result may be of a class of a package that is absent",
        ) from None
