"""The mesh, its shardings, putting arrays there and fetching them, and what the process tells its allocator.

The mesh has two axes. A batch is split over both, `data` and `fsdp`; parameters, optimizer state and averages are
split over `fsdp` alone and whole along `data` (Rajbhandari et al. 2020, ZeRO; the third stage), so that XLA gathers
each parameter where it is used and scatters its gradient.
"""

import contextlib
import ctypes
import functools
import math
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import dispatch
from lra_jax import errors

AXES = ("data", "fsdp")
SMALL = 2**14  # elements; arrays with fewer are whole everywhere: gathering them costs more than their memory

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
  """Makes glibc keep freed memory for the next step. Call it before JAX makes its threads.

  XLA's CPU backend takes the temporary memory of a step in one piece and gives it back after the step; by default each
  step then faults every page in anew, a quarter of the step of Sequencer2D at 32 px. No effect outside glibc.
  """
  if not sys.platform.startswith("linux"):
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
  """A mesh of data × fsdp devices, of all processes; data −1 takes as many as there are.

  Raises:
    UserError: there are not as many devices, or some would be left out of a run of several processes.
  """
  devices = jax.devices()
  where = f"config.parallel.data={data}, fsdp={fsdp}"
  if fsdp < 1 or (data == -1 and len(devices) % fsdp):
    raise errors.UserError(f"{where}: {len(devices)} devices cannot be cut into groups of {fsdp}; take a divisor")
  rows = len(devices) // fsdp if data == -1 else data
  if not 1 <= rows * fsdp <= len(devices):
    raise errors.UserError(f"{where}: there are {len(devices)} devices; take data=-1 for all of them")
  if jax.process_count() > 1 and rows * fsdp < len(devices):
    raise errors.UserError(f"{where}: {jax.process_count()} processes have {len(devices)} devices; take all of them")
  return jax.make_mesh((rows, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[: rows * fsdp])


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Axis number `axis` split over all devices."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def by_rule(tree: Any, mesh: Mesh) -> Any:
  """Shardings of a training state: of every array its largest axis that `fsdp` divides is split over it.

  Of equal axes the last is taken. Arrays with fewer than `SMALL` elements, or without such an axis, are whole.
  Arrays of one shape are split alike, so an optimizer's moments lie where their parameter does.

  Args:
    tree: of anything with a shape.
    mesh: with axis `fsdp`.
  """
  return jax.tree.map(lambda leaf: NamedSharding(mesh, spec_by_rule(leaf, mesh)), tree)


def spec_by_rule(array: Any, mesh: Mesh) -> PartitionSpec:
  """How `by_rule` splits one array, or anything with a shape."""
  parts = mesh.shape["fsdp"]
  axes = [axis for axis, size in enumerate(array.shape) if size % parts == 0]
  if parts == 1 or math.prod(array.shape) < SMALL or not axes:
    return PartitionSpec()
  axis = max(axes, key=lambda axis: (array.shape[axis], axis))
  return PartitionSpec(*[None] * axis, "fsdp")


def batches_split(mesh: Mesh) -> contextlib.AbstractContextManager:
  """`dispatch.batches_split` over all devices, with weights as `by_rule` splits them."""
  return dispatch.batches_split(mesh, AXES, functools.partial(spec_by_rule, mesh=mesh))


def put(tree: Any, shardings: Any) -> Any:
  """Arrays of the host on devices. Every process gives the whole arrays, the same ones, and keeps its own parts.

  Args:
    tree: of arrays.
    shardings: one for all, or a tree of them.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def one(array, sharding):
    if sharding.is_fully_addressable:
      return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(one, tree, shardings)


def fetch(tree: Any) -> Any:
  """Arrays of any sharding as whole NumPy arrays, in every process; all processes must call it."""

  def one(array):
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
      return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.tree.map(one, tree)


def describe(mesh: Mesh) -> str:
  """Number and kind of the devices, such as "8 × NVIDIA H200", and how they are used where that is a choice."""
  kind = mesh.devices.flat[0].device_kind
  text = f"{mesh.size} × {kind}" if mesh.size > 1 else kind
  if mesh.shape["fsdp"] > 1:
    text += f" (data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']})"
  if jax.process_count() > 1:
    text += f" of {jax.process_count()} processes"
  return text
