"""The mesh, its shardings, and what the process should be told before JAX starts."""

import ctypes
import sys

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lra_jax import errors

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


def make_mesh(data: int) -> Mesh:
  """A mesh with one axis, `data`, over `data` devices; −1 takes all there are.

  Raises:
    UserError: there are fewer devices.
  """
  devices = jax.devices()
  count = len(devices) if data == -1 else data
  if not 1 <= count <= len(devices):
    raise errors.UserError(f"config.parallel.data={data}: there are {len(devices)} devices; take -1 for all of them")
  return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Axis number `axis` split over the devices."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def describe(mesh: Mesh) -> str:
  """Number and kind of the devices, such as "8 × NVIDIA H200"."""
  kind = mesh.devices.flat[0].device_kind
  return f"{mesh.size} × {kind}" if mesh.size > 1 else kind
