"""Loading a checkpoint without an alpha, such as one of a softmax model, into a module that has one."""

from __future__ import annotations

import logging
from typing import Any

from diffmax.nn._precision import PreciseBuffers

# Names of attributes that hold an alpha, in our modules and usually in others.
ALPHAS = ("alpha", "log_beta")


class AlphaFromSoftmax(PreciseBuffers):
    """A module that keeps its alpha if a checkpoint has none, because the model was trained with softmax or with a float alpha.

    So `strict=True` requires only the other entries. An alpha on the device "meta" has no value to keep and is missing.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(prefix + name in state_dict for name in ALPHAS):
            persistent = {n: t for n, t in self._buffers.items() if n not in self._non_persistent_buffers_set}
            for name, kept in (self._parameters | persistent).items():
                if name in ALPHAS and kept is not None and not kept.is_meta:
                    state_dict[prefix + name] = kept
                    logging.getLogger("diffmax").info(f"{type(self).__name__}: no {prefix}{name} in the checkpoint, it is kept")
        super()._load_from_state_dict(state_dict, prefix, *args)
