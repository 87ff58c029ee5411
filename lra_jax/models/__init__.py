"""The models, by name. `create` builds one, `names` lists them, `count_params` counts."""

import inspect
import math
from collections.abc import Callable

import jax
from flax import nnx

from lra_jax import errors
from lra_jax.models import layers, sequencer

# name → (constructor, its arguments). Plain, so that one can search for a name and find all of it.
REGISTRY: dict[str, tuple[Callable, dict]] = {
  **{name: (sequencer.Sequencer, dict(two_dimensional=True, **v)) for name, v in sequencer.SEQUENCER2D.items()},
  **{name: (sequencer.Sequencer, dict(two_dimensional=False, **v)) for name, v in sequencer.VANILLA_SEQUENCER.items()},
}


def names() -> list[str]:
  """All model names, sorted."""
  return sorted(REGISTRY)


def create(
  name: str,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  rngs: nnx.Rngs,
  init: str = "paper",
  **overrides,
) -> nnx.Module:
  """Builds a model.

  Args:
    name: one of `names()`.
    input_shape: of one example; (H, W, C) for images.
    num_classes: number of logits.
    rngs: `nnx.Rngs(seed)`; stream `params` initialises.
    init: "paper" (its own initialisation), "xavier" or "he"; see `layers.reinitialize`.
    **overrides: arguments of the model's constructor that shall differ from the preset's.

  Returns:
    A module: `model(x, *, train=False, rngs=None)` gives float32 logits (B, S). `x` is (B, *input_shape), float32.

  Raises:
    UserError: an unknown name, override or scheme (near misses are named), or values that do not fit.
  """
  if name not in REGISTRY:
    raise errors.UserError(errors.unknown("model", name, REGISTRY))
  constructor, preset = REGISTRY[name]
  known = set(inspect.signature(constructor.__init__).parameters) - {"self", "input_shape", "num_classes", "rngs"}
  for key in overrides:
    if key not in known:
      raise errors.UserError(errors.unknown(f"config.model of {name}: field", key, known | {"name", "init"}))
  model = constructor(input_shape=tuple(input_shape), num_classes=num_classes, rngs=rngs, **preset | overrides)
  layers.reinitialize(model, init, rngs)
  return model


def count_params(model: nnx.Module) -> int:
  """Number of trainable parameters; also of an abstract model, as `nnx.eval_shape` makes."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
