"""Real shapes of the operation: the layers of ResNet-18 at 32 px (with a 3×3 stem)."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.cases import Case
from kernels.conv2d import conv2d


class Shape(NamedTuple):
  """B images of H rows and W columns, from C to O channels, square kernels of size K; zeros on every side."""

  batch: int
  rows: int
  columns: int
  channels: int
  outputs: int
  kernel: int
  strides: int
  padding: int


CONV2D = {
  "resnet18_stem": Shape(64, 32, 32, 3, 64, 3, 1, 1),
  "resnet18_stage1": Shape(64, 32, 32, 64, 64, 3, 1, 1),
  "resnet18_stage2_first": Shape(64, 32, 32, 64, 128, 3, 2, 1),
  "resnet18_stage2_shortcut": Shape(64, 32, 32, 64, 128, 1, 2, 0),
  "resnet18_stage2": Shape(64, 16, 16, 128, 128, 3, 1, 1),
  "resnet18_stage3": Shape(64, 8, 8, 256, 256, 3, 1, 1),
  "resnet18_stage4": Shape(64, 4, 4, 512, 512, 3, 1, 1),
}


def cases() -> Iterator[Case]:
  """Every shape in float32 and bfloat16."""
  for name, shape in CONV2D.items():
    for dtype in (jnp.float32, jnp.bfloat16):
      x = jax.ShapeDtypeStruct(shape[:4], dtype)
      w = jax.ShapeDtypeStruct((shape.kernel, shape.kernel, shape.channels, shape.outputs), dtype)
      outputs = shape.batch * (shape.rows // shape.strides) * (shape.columns // shape.strides) * shape.outputs
      inputs = shape.batch * shape.rows * shape.columns * shape.channels
      # Forward: x, y; backward: y's gradient, x, and x's gradient. The filters are small beside most of them.
      itemsize, operations = jnp.dtype(dtype).itemsize, 2 * outputs * shape.kernel**2 * shape.channels
      yield Case(
        "conv2d",
        name,
        dtype,
        functools.partial(conv2d, strides=shape.strides, padding=shape.padding),
        lambda rng, x=x, w=w: (rng.randn(*x.shape), rng.randn(*w.shape)),
        (x, w),
        ("xla", "im2col"),
        (True, False),
        (0, 1),
        ((inputs + outputs) * itemsize, (3 * inputs + 2 * outputs) * itemsize),
        (operations, 3 * operations),
      )
