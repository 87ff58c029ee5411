"""Real shapes of the operation: ConvMixer at 32 px (patches of 2 and of 1), and a small one for tests on CPU."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.cases import Case
from kernels.depthwise_conv import depthwise_conv2d


class Shape(NamedTuple):
  """B images of H rows and W columns, C channels, square kernels of size K."""

  batch: int
  rows: int
  columns: int
  channels: int
  kernel: int


DEPTHWISE_CONV = {
  "convmixer256_patch2_kernel5": Shape(64, 16, 16, 256, 5),
  "convmixer256_patch2_kernel9": Shape(64, 16, 16, 256, 9),
  "convmixer256_patch1_kernel9": Shape(64, 32, 32, 256, 9),
  "small": Shape(64, 8, 8, 64, 3),
}


def cases() -> Iterator[Case]:
  """Every shape in float32 and bfloat16."""
  for name, shape in DEPTHWISE_CONV.items():
    for dtype in (jnp.float32, jnp.bfloat16):
      x = jax.ShapeDtypeStruct(shape[:4], dtype)
      w = jax.ShapeDtypeStruct((shape.kernel, shape.kernel, shape.channels), dtype)
      size = shape.batch * shape.rows * shape.columns * shape.channels
      # Forward: x, y; backward: y's gradient, x, and x's gradient. The filters are small beside them.
      transferred, operations = size * jnp.dtype(dtype).itemsize, 2 * size * shape.kernel**2
      yield Case(
        "depthwise_conv",
        name,
        dtype,
        depthwise_conv2d,
        lambda rng, x=x, w=w: (rng.randn(*x.shape), rng.randn(*w.shape)),
        (x, w),
        ("xla", "shifted"),
        (True, False),
        (0, 1),
        (2 * transferred, 5 * transferred),
        (operations, 3 * operations),
      )
