"""What the operators share of autograd and autocast."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor


def keep_types(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off where `tensor` is: a result has the type of what it is made of."""
    kind = tensor.device.type
    # One of "meta" computes nothing, and has no autocast. To switch off what is off would take as
    # long as a small operator.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def make_room(given: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Memory for a result of this shape that is made of all of `given`, and of their type.

    Within `vmap`, or for a batch of gradients, a tensor has an axis that its shape does not show,
    and what is copied to a place needs that axis there: so all that have one must be asked.
    """
    like = reduce(torch.add, (tensor[:0].reshape(-1) for tensor in given))
    return like.new_empty(shape)


def differentiate(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Tensor | tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Return the gradients of `tensors` that are needed, by autograd of `run(*tensors)`.

    `grads` are those of what `run` returns. Where autograd records this itself, as it does for a
    second derivative, the gradients are functions of `tensors` and `grads`, and can be
    differentiated.
    """
    recorded = torch.is_grad_enabled()

    def own(tensor: Tensor | None, need: bool) -> Tensor | None:
        if tensor is None or not need:
            return tensor
        # A view of its own: what one of `tensors` owes to another, autograd adds elsewhere.
        return tensor.view_as(tensor) if recorded else tensor.detach().requires_grad_()

    first = grads if isinstance(grads, Tensor) else grads[0]
    with torch.enable_grad(), keep_types(first):
        owned = [own(tensor, need) for tensor, need in zip(tensors, needed, strict=True)]
        wanted = [t for t, need in zip(owned, needed, strict=True) if t is not None and need]
        results = run(*owned)
        outs = (results,) if isinstance(results, Tensor) else results
        of_outs = (grads,) if isinstance(grads, Tensor) else grads
        pairs = [pair for pair in zip(outs, of_outs, strict=True) if pair[0].requires_grad]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [of for _, of in pairs],
                create_graph=recorded,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needed]
