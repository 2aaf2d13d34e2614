"""An alpha schedule in transformers' Trainer."""

from __future__ import annotations

from typing import Any

from diffmax.nn.schedule import AlphaSchedule


def alpha_callback(schedule: AlphaSchedule) -> Any:
    """A callback for transformers' Trainer that steps a schedule with the Trainer, and logs its share as `alpha_share`.

    Args:
        schedule: A schedule of the model, or the one that was passed to `register` as alpha. Resumed training continues at the
            step of the Trainer.
    Returns:
        A `transformers.TrainerCallback`, for `Trainer(callbacks=[...])`.
    Raises:
        ImportError: transformers is missing.
        TypeError: schedule is not an `AlphaSchedule`.
    Example:
        >>> from diffmax.integrations.transformers import register
        >>> schedule = AlphaSchedule(0.75, steps=1000)
        >>> register("diffmax-annealed", alpha=schedule)
        >>> callback = alpha_callback(schedule)  # Trainer(model, ..., callbacks=[callback])
    """
    if not isinstance(schedule, AlphaSchedule):
        raise TypeError(f"alpha_callback: schedule must be a diffmax.nn.AlphaSchedule, got {type(schedule).__name__}")
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            'alpha_callback: transformers is needed, got none\npip install "diffmax-core[transformers]"'
        ) from error

    class AlphaCallback(TrainerCallback):
        """Sets the step before each step's forward pass."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            schedule.step(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            schedule.step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            if logs is not None:
                logs["alpha_share"] = schedule.share

    return AlphaCallback()
