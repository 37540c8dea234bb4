"""Reading and replacing the logits in what a model returns."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

# Names under which models return logits. CLIP in transformers uses the second.
LOGIT_NAMES = ("logits", "logits_per_image")
_DEEPEST = 6  # an object can hold itself
Path = tuple[str | int, ...]


def get_logits(output: Any, num_classes: int | None = None) -> Tensor:
    """Return the logits in the output of a model.

    Args:
        output: A tensor, or a tuple, list, mapping or object that holds one at any depth.
        num_classes: The number of classes ``C``. Where an output holds several tensors, the logits are the first one of
            this width, and tensors called ``logits`` or ``logits_per_image`` come first. If none has this width, or for
            ``None``, they are what has one of these names, or the first tensor of a tuple or list that is not a scalar,
            as a loss is.

    Raises:
        ValueError: If there are none.

    Example:
        >>> import torch
        >>> get_logits({"loss": torch.zeros(()), "logits": torch.ones(1, 2)})
        tensor([[1., 1.]])
        >>> get_logits((torch.zeros(1, 8), torch.ones(1, 2)), num_classes=2)
        tensor([[1., 1.]])
    """
    logits: Tensor = _at(output, _path(output, num_classes))
    return logits


def replace_logits(output: Any, logits: Tensor, num_classes: int | None = None) -> Any:
    """Return a copy of the output of a model, of the same type, with other logits and all else as it was.

    Args:
        output: As in :func:`get_logits`.
        logits: The tensor to put in place of the logits.
        num_classes: As in :func:`get_logits`.

    Example:
        >>> import torch
        >>> replace_logits((torch.zeros(1, 2), "text"), torch.ones(1, 2))
        (tensor([[1., 1.]]), 'text')
    """
    return _replaced(output, _path(output, num_classes), logits)


def tensors_in(output: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield each tensor in an output with its path of keys, indices and names of attributes.

    In each mapping and object, what may be the logits by its name comes first.

    Example:
        >>> import torch
        >>> [path for path, _ in tensors_in({"loss": torch.zeros(()), "logits": [torch.ones(1, 2)]})]
        [('logits', 0), ('loss',)]
    """
    if isinstance(output, Tensor):
        yield path, output
        return
    for key, item in _items(output) if len(path) < _DEEPEST else ():
        yield from tensors_in(item, (*path, key))


def _path(output: Any, num_classes: int | None) -> Path:
    if isinstance(output, Tensor):  # the usual case, which compiled code runs through
        return ()
    paths = [(path, tensor) for path, tensor in tensors_in(output) if tensor.ndim > 0]
    fitting = [path for path, tensor in paths if num_classes in (tensor.shape[-1], *tensor.shape[-3:-2])]
    named = [path for path, _ in paths if all(isinstance(key, int) or key in LOGIT_NAMES for key in path)]
    for path in fitting + named:
        return path
    raise ValueError(
        f"Expected the output of the head or model to hold logits, but got {type(output)}. Return a tensor, a tuple"
        " or list with one, or an object or mapping that has them as `logits`."
    )


def _items(output: Any) -> list[tuple[str | int, Any]]:
    """Return the parts of an output with their keys, indices or names of attributes."""
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, (tuple, list)):
        fields = getattr(output, "_fields", ())
        items = list(enumerate(output))
        # A named tuple is read by index, since it cannot be changed by name.
        return sorted(items, key=lambda item: _rank(fields[item[0]])) if fields else items
    elif isinstance(output, (nn.Module, type, str, bytes)):
        return []
    else:
        items = list(getattr(output, "__dict__", {}).items())
    return sorted(items, key=lambda item: _rank(item[0]))


def _rank(name: Any) -> int:
    return LOGIT_NAMES.index(name) if name in LOGIT_NAMES else len(LOGIT_NAMES)


def _at(output: Any, path: Path) -> Any:
    for key in path:
        output = output[key] if _is_indexed(output) else getattr(output, str(key))
    return output


def _is_indexed(output: Any) -> bool:
    return isinstance(output, (Mapping, tuple, list))


def _replaced(output: Any, path: Path, logits: Tensor) -> Any:
    if not path:
        return logits
    key, *rest = path
    value = _replaced(_at(output, (key,)), tuple(rest), logits)
    if isinstance(output, (tuple, list)):
        items = list(output)
        items[int(key)] = value
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    # The compiler supports `copy` of a plain dict, and `copy.copy` of the outputs of transformers.
    copied = output.copy() if type(output) in (dict, OrderedDict) else copy.copy(output)
    if isinstance(output, Mapping):
        copied[key] = value
    else:
        object.__setattr__(copied, str(key), value)  # of a frozen dataclass too
    return copied
