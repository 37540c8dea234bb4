"""Reading and replacing the logits in what a model returns."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Names under which models return logits. CLIP in transformers uses the second.
_NAMES = ("logits", "logits_per_image")


def get_logits(output: Any) -> Tensor:
    """Return the logits in the output of a model.

    These are the output itself, its key or attribute ``logits`` or ``logits_per_image``, or the first tensor of a tuple
    or list that is not a scalar, as a loss is.

    Raises:
        ValueError: If there are none.

    Example:
        >>> import torch
        >>> get_logits({"loss": torch.zeros(()), "logits": torch.ones(1, 2)})
        tensor([[1., 1.]])
    """
    if isinstance(output, Tensor):
        return output
    key = _key(output)
    if key is None:
        raise ValueError(
            f"Expected the output of the head or model to hold logits, but got {type(output)}. Return a tensor, a tuple"
            " or list with one, or an object or mapping that has them as `logits`."
        )
    return get_logits(_item(output, key))


def replace_logits(output: Any, logits: Tensor) -> Any:
    """Return a copy of the output of a model, of the same type, with other logits and all else as it was.

    Example:
        >>> import torch
        >>> replace_logits((torch.zeros(1, 2), "text"), torch.ones(1, 2))
        (tensor([[1., 1.]]), 'text')
    """
    if isinstance(output, Tensor):
        return logits
    key = _key(output)
    assert key is not None
    value = replace_logits(_item(output, key), logits)
    if isinstance(key, int):
        items = list(output)
        items[key] = value
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    # The compiler supports `copy` of a plain dict, and `copy.copy` of the outputs of transformers.
    copied = output.copy() if type(output) in (dict, OrderedDict) else copy.copy(output)
    if isinstance(output, Mapping):
        copied[key] = value
    else:
        object.__setattr__(copied, key, value)  # of a frozen dataclass too
    return copied


def _item(output: Any, key: str | int) -> Any:
    return output[key] if isinstance(key, int) or isinstance(output, Mapping) else getattr(output, key)


def _key(output: Any) -> str | int | None:
    """Return where the logits are: a key, the name of an attribute, or an index."""
    for name in _NAMES:
        if isinstance(output, Mapping):
            if name in output:
                return name
        elif hasattr(output, name):
            fields = getattr(type(output), "_fields", None)  # of a named tuple, which cannot be changed by name
            return name if fields is None else fields.index(name)
    if isinstance(output, (tuple, list)):
        for index, item in enumerate(output):
            if isinstance(item, Tensor) and item.ndim > 0:
                return index
    return None
