"""Weights of the public PyTorch implementations into our models and back, strictly: every tensor used, every shape
checked.

No pickle is read: a file is safetensors, a state dict is what the caller already has in memory.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lra_jax import errors
from lra_jax.interop import hugging_face, timm
from lra_jax.interop import sequencer as sequencer_layout
from lra_jax.interop.layout import Entries
from lra_jax.models import convmixer, fnet, gmlp, mlp_mixer, nystromformer, resnet, sequencer, vit

# Buffers of the public implementations that hold no weights.
IGNORED = (".num_batches_tracked", ".position_ids", ".token_type_ids")


class Layout(NamedTuple):
  """How one public implementation names and orders the weights of a model.

  Attributes:
    entries: model → its `layout.Entries`.
    rename: brings other names of the same layout to the ones that `entries` uses.
  """

  entries: Callable[[nnx.Module], Entries]
  rename: Callable[[str], str] = lambda name: name


LAYOUTS = {
  sequencer.Sequencer: Layout(sequencer_layout.entries, sequencer_layout.rename),
  vit.Vit: Layout(timm.vit),
  mlp_mixer.MlpMixer: Layout(timm.mlp_mixer),
  gmlp.Gmlp: Layout(timm.gmlp),
  convmixer.ConvMixer: Layout(timm.convmixer),
  resnet.ResNet: Layout(timm.resnet),
  nystromformer.Nystromformer: Layout(hugging_face.nystromformer),
  fnet.Fnet: Layout(hugging_face.fnet),
}


def load_torch(model: nnx.Module, weights: Mapping | str | pathlib.Path) -> None:
  """Copies published weights into a model, in place, running statistics of BatchNorm included.

  Layouts: timm's Sequencer2D, VisionTransformer, MlpMixer, gMLP, ConvMixer and ResNet (torchvision's too);
  transformers' Nyströmformer and FNet for sequence classification; the authors' Sequencer2D and VanillaSequencer
  (okojoalg/sequencer).

  Args:
    model: of the same variant, `num_classes` and `input_shape` as the weights.
    weights: a state dict (name → torch tensor or array), or the path of a safetensors file.

  Raises:
    UserError: a tensor is missing, left over or of another shape, the file cannot be read, or no public implementation
      has this model. The model is unchanged then.
  """
  layout = _layout(model)
  tensors = {layout.rename(name): value for name, value in _read(weights).items() if not name.endswith(IGNORED)}
  tensors = {name: _to_numpy(value) for name, value in tensors.items()}
  arrays = _arrays(model)
  new, used = {}, set()
  for path, entry in _entries(layout, model, arrays).items():
    missing = [name for name in entry.names if name not in tensors]
    if missing:
      raise errors.UserError(f"weights: tensor {missing[0]!r} is missing; is this another variant of the model?")
    shape = tensors[entry.names[0]].shape
    try:
      value = entry.load([tensors[name] for name in entry.names])
    except (ValueError, IndexError) as error:
      raise errors.UserError(f"weights: {entry.names[0]!r} has shape {shape}, not what its place needs") from error
    expected = arrays[path].shape
    if value.shape != expected:
      raise errors.UserError(
        f"weights: {entry.names[0]!r} has shape {shape}, which makes {value.shape}; "
        f"{'/'.join(map(str, path))} is {expected}"
      )
    new[path] = value
    used.update(entry.names)
  unused = sorted(tensors.keys() - used)
  if unused:
    raise errors.UserError(f"weights: {len(unused)} tensors have no place in the model, such as {unused[0]!r}")
  for path, value in new.items():
    arrays[path][...] = jnp.asarray(value, arrays[path].dtype)


def save_torch(model: nnx.Module, path: str | pathlib.Path | None = None) -> dict[str, np.ndarray]:
  """The weights of a model under the names and in the shapes of its public implementation: the inverse of `load_torch`.

  Counters that hold no weights (`num_batches_tracked` of BatchNorm) are left out; PyTorch fills them in.

  Args:
    model: one that `load_torch` knows.
    path: safetensors file to write as well; None for none.

  Returns:
    Name → float32 array.

  Raises:
    UserError: no public implementation has this model, or the file cannot be written.
  """
  arrays = _arrays(model)
  tensors = {}
  for place, entry in _entries(_layout(model), model, arrays).items():
    values = entry.save(np.asarray(arrays[place][...], np.float32))
    tensors |= {name: np.ascontiguousarray(value) for name, value in zip(entry.names, values, strict=True)}
  if path is not None:
    import safetensors.numpy

    try:
      safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    except OSError as error:
      raise errors.UserError(f"weights file {path} cannot be written ({error})") from error
  return tensors


def _layout(model):
  if type(model) not in LAYOUTS:
    names = ", ".join(sorted(kind.__name__ for kind in LAYOUTS))
    raise errors.UserError(f"there are no public PyTorch weights of {type(model).__name__}; there are of {names}")
  return LAYOUTS[type(model)]


def _arrays(model):
  """Parameters and running statistics by path."""
  return dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))


def _entries(layout, model, arrays):
  entries = layout.entries(model)
  if arrays.keys() != entries.keys():
    raise AssertionError(f"layout of {type(model).__name__}: {arrays.keys() ^ entries.keys()}")
  return entries


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
