"""Optimizers, schedules, weight-decay mask, moving average: Optax, chosen by config."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib

from lra_jax import errors
from lra_jax.models import layers

OPTIMIZERS = ("adamw", "adam", "sgd", "lion")
SCHEDULES = ("cosine", "one_cycle", "piecewise", "linear", "rsqrt", "plateau", "constant")


def make_schedule(config: ml_collections.ConfigDict, steps: int, steps_per_epoch: float) -> optax.Schedule:
  """Learning rate by step.

  Args:
    config: `config.optim`; durations in epochs, converted here.
    steps: of the whole training.
    steps_per_epoch: N / batch size, not rounded.

  Returns:
    A function of the step, counted from 0.

  Raises:
    UserError: unknown schedule, or durations that do not fit into the training.
  """
  peak, schedule = config.learning_rate, config.schedule
  errors.check_known("config.optim.schedule.name:", schedule.name, SCHEDULES)
  warmup = round(schedule.warmup_epochs * steps_per_epoch)
  cooldown = round(schedule.cooldown_epochs * steps_per_epoch) if schedule.name == "cosine" else 0
  if warmup + cooldown >= steps and schedule.name != "rsqrt":  # it has no end, and may stop while it rises
    raise errors.UserError(
      f"config.optim.schedule: warmup_epochs={schedule.warmup_epochs} and cooldown_epochs={schedule.cooldown_epochs} "
      f"are {warmup + cooldown} steps, the whole training has {steps}; shorten them or train longer"
    )
  warm = optax.linear_schedule(schedule.warmup_rate, peak, warmup)

  if schedule.name == "one_cycle":  # Smith & Topin 2018; brings its own warm-up
    return optax.cosine_onecycle_schedule(
      steps, peak, schedule.peak_at, schedule.start_divisor, schedule.end_divisor / schedule.start_divisor
    )
  if schedule.name == "cosine":  # SGDR (Loshchilov & Hutter 2017), every cycle's peak lower by cycle_decay
    if schedule.cycles < 1:
      raise errors.UserError(f"config.optim.schedule.cycles={schedule.cycles}: at least 1 is needed")
    ends = [warmup + round((steps - cooldown - warmup) * (i + 1) / schedule.cycles) for i in range(schedule.cycles)]
    parts, starts = [warm], [warmup]
    for i, end in enumerate(ends):
      cycle_peak = peak * schedule.cycle_decay**i
      length = max(end - starts[-1], 1)
      parts.append(optax.cosine_decay_schedule(cycle_peak, length, min(schedule.final_rate / cycle_peak, 1.0)))
      starts.append(end)
    return optax.join_schedules([*parts, optax.constant_schedule(schedule.final_rate)], starts)
  if schedule.name == "linear":  # brings its own warm-up
    shares, factors = tuple(schedule.shares), tuple(schedule.factors)
    if (
      len(shares) != len(factors)
      or len(shares) < 2
      or list(shares) != sorted(shares)
      or (shares[0], shares[-1]) != (0, 1)
    ):
      raise errors.UserError(
        f"config.optim.schedule: shares={shares} must ascend from 0 to 1, with one of factors={factors} for each"
      )
    return lambda step: peak * jnp.interp(step / steps, jnp.asarray(shares), jnp.asarray(factors))
  if schedule.name == "rsqrt":  # Vaswani et al. 2017, section 5.3: after the warm-up's w steps, peak · √(w / t)
    start = max(warmup, 1)
    return optax.join_schedules(
      [warm, lambda step: peak * jnp.sqrt(start / jnp.maximum(step + warmup, start))], [warmup]
    )
  if schedule.name == "piecewise":
    boundaries = {round(epoch * steps_per_epoch) - warmup: schedule.factor for epoch in schedule.boundaries_epochs}
    return optax.join_schedules([warm, optax.piecewise_constant_schedule(peak, boundaries)], [warmup])
  return optax.join_schedules([warm, optax.constant_schedule(peak)], [warmup])  # constant; plateau scales it


def make_plateau(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
  """Reduces the rate where the validation loss no longer falls; stepped once an evaluation."""
  schedule = config.schedule
  return optax.contrib.reduce_on_plateau(factor=schedule.factor, patience=schedule.patience, rtol=0.0, atol=1e-4)


def decay_mask(params: Any, spared: Sequence[str] = ()) -> Any:
  """True for weight matrices, False for biases, norms, embeddings, positions and names of `spared`; a tree as `params`.

  Raises:
    UserError: a name that no parameter has.
  """
  _check_names("no_decay", spared, params)
  keep = lambda path, _: layers.is_weight(path[-1].key) and path[-1].key not in spared
  return jax.tree_util.tree_map_with_path(keep, params)


def recurrence_mask(params: Any, names: Sequence[str] = ()) -> Any:
  """True for parameters of these names, by default the eigenvalues and steps of linear recurrences; as `params`.

  Raises:
    UserError: a name that no parameter has.
  """
  _check_names("recurrence", names, params)
  chosen = names or layers.RECURRENCE
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in chosen, params)


def _check_names(field, names, params):
  there = sorted({str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)}) if names else ()
  for name in names:
    errors.check_known(f"config.optim.{field}: parameter", name, there)


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """The optimizer of `config.optim`, gradient clipping by global norm first.

  AdamW and Lion decay weights apart from the gradient; Adam and SGD add the decay to it, as PyTorch's do.

  Raises:
    UserError: unknown optimizer.
  """
  errors.check_known("config.optim.name:", config.name, OPTIMIZERS)
  if config.recurrence_rate < 0:
    raise errors.UserError(f"config.optim.recurrence_rate={config.recurrence_rate} must not be negative")
  mask = functools.partial(decay_mask, spared=tuple(config.no_decay))
  decoupled = dict(weight_decay=config.weight_decay, mask=mask)
  coupled = optax.add_decayed_weights(**decoupled)
  optimizer = {
    "adamw": lambda: optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, **decoupled),
    "adam": lambda: optax.chain(coupled, optax.adam(schedule, b1=config.b1, b2=config.b2, eps=config.eps)),
    "sgd": lambda: optax.chain(coupled, optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov)),
    "lion": lambda: optax.lion(schedule, b1=config.b1, b2=config.b2, **decoupled),
  }[config.name]()
  if config.recurrence_rate != 1:
    names = functools.partial(recurrence_mask, names=tuple(config.recurrence))
    slower = optax.masked(optax.scale(config.recurrence_rate), names)
    optimizer = optax.chain(optimizer, slower)  # Adam's update and its decay are proportional to the rate
  if not config.clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def ema_update(ema: Any, new: Any, step: jax.Array, decay: float) -> Any:
  """Exponential moving average with warm-up: its decay at step t is min(decay, (1 + t) / (10 + t)).

  Without the warm-up an average of a short run consists of its initialisation.
  """
  rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda a, b: a + rate * (b - a), ema, new)
