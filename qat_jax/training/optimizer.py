"""Optimiser, learning-rate schedule and weight decay from plain settings.

Durations are given in steps, epochs or percent of the run, exactly one of the three.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

UNITS = ("steps", "epochs", "percent")

# The names Flax gives to the weights of products and look-ups. Everything else (biases, norms'
# scales, learned constants) is not decayed.
DECAYED = ("kernel", "embedding")


def duration_in_steps(
    settings: Mapping[str, Any],
    name: str,
    *,
    steps_per_epoch: int,
    total_steps: int | None = None,
) -> int:
    """Reads a duration given as `{name}_steps`, `{name}_epochs` or `{name}_percent`.

    Args:
        settings: holds exactly one of the three keys; a value of None counts as absent.
        name: what lasts, such as "warmup".
        steps_per_epoch: optimiser steps in one pass over the training set.
        total_steps: the length of the run; needed for percent.

    Returns:
        Whole steps, rounded to nearest.

    Raises:
        ValueError: none or several of the keys are given, or the value is negative or not allowed.
    """
    keys = [f"{name}_{unit}" for unit in UNITS]
    given = [key for key in keys if settings.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(keys)}; got {', '.join(given) or 'none'}")
    (key,) = given
    value = settings[key]
    if not 0 <= value < math.inf:
        raise ValueError(f"{key} is {value}: a duration is a number that is not negative")
    if key.endswith("_steps"):
        return int(value)
    if key.endswith("_epochs"):
        return round(value * steps_per_epoch)
    if total_steps is None:
        raise ValueError(f"{key} needs the length of the run: give {name}_steps or {name}_epochs")
    return round(value / 100 * total_steps)


def make_schedule(
    settings: Mapping[str, Any],
    learning_rate: float,
    *,
    total_steps: int,
    steps_per_epoch: int,
) -> optax.Schedule:
    """The learning rate as a function of the step.

    A linear warm-up from 0 to `learning_rate` over `warmup_{steps,epochs,percent}` is followed by

    - `name="constant"`: the learning rate itself;
    - `name="cosine"`: half a cosine to 0 at `total_steps`;
    - `name="linear"`: a line to 0 at `total_steps`;
    - `name="step"`: times `decay_factor` every `decay_every_{steps,epochs,percent}`, counted from
      the start of the run.

    Args:
        settings: `name`, the warm-up (optional) and, for "step", the two decay settings.
        learning_rate: the peak.
        total_steps: the length of the run.
        steps_per_epoch: optimiser steps in one pass over the training set.

    Raises:
        ValueError: an unknown name, a setting that it needs is missing, or a warm-up longer than
            the run.
    """

    def steps(duration: str) -> int:
        return duration_in_steps(
            settings, duration, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        )

    has_warmup = any(settings.get(f"warmup_{unit}") is not None for unit in UNITS)
    warmup_steps = steps("warmup") if has_warmup else 0
    if warmup_steps >= total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps fills the run of {total_steps} steps")

    match settings["name"]:
        case "constant":
            body = optax.constant_schedule(learning_rate)
        case "cosine":
            body = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
        case "linear":
            body = optax.linear_schedule(learning_rate, 0.0, total_steps - warmup_steps)
        case "step":
            every = steps("decay_every")
            if every < 1:
                raise ValueError("decay_every must be at least one step")
            factor = _needed(settings, "decay_factor", "schedule")
            body = _step_decay(learning_rate, factor, every, warmup_steps)
        case unknown:
            raise ValueError(
                f"unknown schedule {unknown!r}: choose constant, cosine, linear or step"
            )
    if warmup_steps == 0:
        return body
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, body], [warmup_steps])


def _step_decay(learning_rate: float, factor: float, every: int, start: int) -> optax.Schedule:
    """Times `factor` every `every` steps of the run, for a schedule that begins at step `start`."""
    return lambda count: learning_rate * factor ** ((count + start) // every)


def weight_decay_mask(params: Any) -> Any:
    """True for the weights of products and look-ups, False for norms, biases and all else.

    Example:
        >>> weight_decay_mask({"conv": {"kernel": 1.0, "bias": 0.0}, "norm": {"scale": 1.0}})
        {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """

    def is_decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        return getattr(path[-1], "key", None) in DECAYED

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(
    settings: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with momentum, or AdamW.

    - `name="sgd"`: `momentum`, `nesterov`; `weight_decay` is an L2 penalty added to the gradient
      before the momentum (the recipe of the ResNet papers).
    - `name="adamw"`: `b1`, `b2`; `weight_decay` is decoupled (Loshchilov & Hutter 2019).

    Weight decay touches only what `weight_decay_mask` marks. `clip_norm` (optional) is the longest
    that the gradient of all parameters together may be; a longer one is shortened first.

    Raises:
        ValueError: an unknown name, or sgd without its momentum.
    """
    optimizer = _unclipped(settings, schedule)
    if settings.get("clip_norm") is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings["clip_norm"]), optimizer)


def _unclipped(
    settings: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    decay = settings["weight_decay"]
    match settings["name"]:
        case "sgd":
            return optax.chain(
                optax.add_decayed_weights(decay, mask=weight_decay_mask),
                optax.sgd(
                    schedule,
                    momentum=_needed(settings, "momentum", "optimizer"),
                    nesterov=settings.get("nesterov", False),
                ),
            )
        case "adamw":
            return optax.adamw(
                schedule,
                b1=settings.get("b1", 0.9),
                b2=settings.get("b2", 0.999),
                weight_decay=decay,
                mask=weight_decay_mask,
            )
        case unknown:
            raise ValueError(f"unknown optimizer {unknown!r}: choose sgd or adamw")


def _needed(settings: Mapping[str, Any], key: str, section: str) -> Any:
    """A setting that the named optimiser or schedule cannot do without; ValueError if missing."""
    if settings.get(key) is None:
        raise ValueError(
            f"{section}.name {settings['name']!r} needs {section}.{key}, which this config does "
            "not have: write it into the config file, or choose another name"
        )
    return settings[key]
