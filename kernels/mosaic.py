"""What the Mosaic GPU kernels share. A kernel runs on Hopper GPUs or, within `dispatch.interpreting()`, on the CPU.

Imported only where a kernel is chosen: importing `kernels` does not load Pallas.
"""

import contextvars
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch

SHARED_MEMORY = (
  232_448  # bytes that a block can have on a Hopper GPU (CUDA C++ Programming Guide, table of capabilities)
)
MULTIPROCESSORS = 132  # of an H100 SXM or H200
WARPGROUP_ROWS = 64  # rows of a wgmma instruction
LOG2_E = math.log2(math.e)

# Put after a kernel's name by `kernels.compile`: the compiler reports a kernel that it has seen before only once.
name_suffix: contextvars.ContextVar[str] = contextvars.ContextVar("name_suffix", default="")
# Name with such a suffix → threads of a block, for its occupancy.
threads_of: dict[str, int] = {}


def kernel(body, **keywords: Any):
  """`plgpu.kernel(body, **keywords)`, interpreted with checks for races within `dispatch.interpreting()`."""

  @functools.wraps(body)
  def named(*refs, **named_refs):
    return body(*refs, **named_refs)

  named.__name__ = body.__name__ + name_suffix.get()
  if name_suffix.get():
    threads_of[named.__name__] = 128 * (keywords.get("num_threads") or 1)
  interpret = plgpu.InterpretGPUParams(detect_races=True) if dispatch.interpreted() else None
  return plgpu.kernel(named, interpret=interpret, **keywords)


def wgmma(accumulator, a, b) -> None:
  """`plgpu.wgmma`. The interpreter does not check its reads; there, both operands are read plainly around it."""
  if not dispatch.interpreted():
    plgpu.wgmma(accumulator, a, b)
    return
  refs = [ref for ref in (a, b) if not isinstance(ref, jax.Array)]
  for ref in refs:
    plgpu.load(ref)
  plgpu.wgmma(accumulator, a, b)
  for ref in refs:
    plgpu.load(ref)
  plgpu.commit_smem()  # else the next copy into the operand counts as a race with these reads


def swizzled(columns: int, dtype) -> tuple:
  """Transforms of a shared-memory array of `columns` columns: the widest swizzle that divides a row.

  Both operands of one wgmma need the same; name it for both where their widths differ.

  Raises:
    ValueError: a row is not a multiple of 32 bytes.
  """
  itemsize = jnp.dtype(dtype).itemsize
  for swizzle in (128, 64, 32):
    if columns * itemsize % swizzle == 0:
      return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
  raise ValueError(f"a row of {columns} × {jnp.dtype(dtype)} is not a multiple of 32 bytes")


def sigmoid(x):
  """By tanh, one instruction on a GPU; `jax.nn.sigmoid` costs a division."""
  return 0.5 * jnp.tanh(0.5 * x) + 0.5


def round_up(number: int, multiple: int) -> int:
  """The smallest multiple that is not below `number`."""
  return -(-number // multiple) * multiple


def pad_axis(x: jax.Array, axis: int, length: int) -> jax.Array:
  """x with zeros at the end of `axis` up to `length`; x itself where nothing is missing."""
  missing = length - x.shape[axis]
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths)
