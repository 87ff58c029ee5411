"""Weights of the public PyTorch implementations into our models, strictly: every tensor used, every shape checked.

No pickle is read: a file is safetensors, a state dict is what the caller already has in memory.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lra_jax import errors
from lra_jax.interop import sequencer as sequencer_layout
from lra_jax.models import sequencer


class Layout(NamedTuple):
  """How one public implementation names and orders the weights of a model.

  Attributes:
    rename: brings older names of the same layout to the ones that `entries` uses.
    entries: our parameter path → names of the tensors it is made of, and the function that makes it of them.
  """

  rename: Callable[[str], str]
  entries: Callable[[nnx.Module], dict[tuple, tuple[list[str], Callable]]]


LAYOUTS = {sequencer.Sequencer: Layout(sequencer_layout.rename, sequencer_layout.entries)}


def load_torch(model: nnx.Module, weights: Mapping | str | pathlib.Path) -> None:
  """Copies published weights into a model, in place.

  Layouts: Sequencer2D as in timm (`sequencer2d_*`) and as in its authors' checkpoints (okojoalg/sequencer), and
  VanillaSequencer as in the latter.

  Args:
    model: of the same variant, `num_classes` and `input_shape` as the weights.
    weights: a state dict (name → torch tensor or array), or the path of a safetensors file.

  Raises:
    UserError: a tensor is missing, left over or of another shape, or the file cannot be read. The model is unchanged
      then.
  """
  layout = LAYOUTS[type(model)]
  tensors = {layout.rename(name): _to_numpy(value) for name, value in _read(weights).items()}
  parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  new, used = {}, set()
  for path, (names, convert) in layout.entries(model).items():
    missing = [name for name in names if name not in tensors]
    if missing:
      raise errors.UserError(f"weights: tensor {missing[0]!r} is missing; is this another variant of the model?")
    try:
      value = convert([tensors[name] for name in names])
    except ValueError as error:
      shape = tensors[names[0]].shape
      raise errors.UserError(f"weights: {names[0]!r} has shape {shape}, not what its place needs") from error
    expected = parameters[path].shape
    if value.shape != expected:
      shape = tensors[names[0]].shape
      raise errors.UserError(
        f"weights: {names[0]!r} has shape {shape}, which makes {value.shape}; {'/'.join(map(str, path))} is {expected}"
      )
    new[path] = value
    used.update(names)
  unused = sorted(tensors.keys() - used)
  if unused:
    raise errors.UserError(f"weights: {len(unused)} tensors have no place in the model, such as {unused[0]!r}")
  if parameters.keys() != new.keys():
    raise AssertionError(f"layout of {type(model).__name__} leaves out {parameters.keys() - new.keys()}")
  for path, value in new.items():
    parameters[path][...] = jnp.asarray(value, parameters[path].dtype)


def _read(weights):
  if isinstance(weights, Mapping):
    return weights
  import safetensors
  import safetensors.numpy

  try:
    return safetensors.numpy.load_file(weights)
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(f"weights file {weights} cannot be read as safetensors ({error})") from error


def _to_numpy(value) -> np.ndarray:
  if hasattr(value, "detach"):  # a torch tensor, told without importing torch
    value = value.detach().cpu().float().numpy()
  return np.asarray(value, np.float32)
