"""Real shapes of the operation, as one direction of one layer sees it, and its cases."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cases import Case
from kernels.linear_recurrence import linear_recurrence


class Shape(NamedTuple):
  """B sequences of T steps, N complex states; whether the diagonal varies, and whether time runs backwards."""

  batch: int
  steps: int
  states: int
  varying: bool = False
  reverse: bool = False


# S5 and LRU on the Long Range Arena's Image, Text and Path-X; S5 computes half of its states, as they come in pairs.
LINEAR_RECURRENCE = {
  "s5_lra_image": Shape(50, 1024, 192),
  "lru_lra_image": Shape(32, 1024, 256),
  "s5_lra_text": Shape(32, 4096, 192),
  "lru_lra_text": Shape(32, 4096, 256),
  "s5_lra_path_x": Shape(16, 16384, 192),
  "lru_lra_path_x": Shape(32, 16384, 256),
  "varying": Shape(32, 4096, 192, varying=True),
  "s5_lra_text_reverse": Shape(32, 4096, 192, reverse=True),  # the other direction of a bidirectional S5
  "digits": Shape(64, 64, 32),
}


def cases() -> Iterator[Case]:
  """Every shape in float32 and bfloat16."""
  for name, shape in LINEAR_RECURRENCE.items():
    for dtype in (jnp.float32, jnp.bfloat16):
      yield _case(name, shape, dtype)


def _case(name, shape, dtype):
  size = shape.batch * shape.steps * shape.states
  x = jax.ShapeDtypeStruct(shape[:3], dtype)
  a = jax.ShapeDtypeStruct(shape[:3] if shape.varying else (shape.states,), jnp.float32)
  # Complex arrays that are read or written. Forward: x, h, and a if it varies; backward: g, h, dx, then a and da.
  array, diagonal = 2 * size * jnp.dtype(dtype).itemsize, 2 * size * 4 * shape.varying
  # A complex multiplication and addition is 8 operations. The kernel takes every step twice, and once more multiplies
  # a varying diagonal; da is another multiplication, and an addition where it is a sum.
  forward = (2 * 8 + 6 * shape.varying) * size
  return Case(
    "linear_recurrence",
    name,
    dtype,
    functools.partial(linear_recurrence, reverse=shape.reverse),
    functools.partial(_draw, shape),
    (x, x, a, a),
    ("sequential", "associative", "mosaic"),
    (True, True, shape.varying, shape.varying),
    (0, 1, 2, 3),
    (2 * array + diagonal, 5 * array + 3 * diagonal),
    (forward, 2 * forward + (6 if shape.varying else 8) * size),
    # Each of four warps takes a quarter of the steps, twice.
    (shape.steps // 2, shape.steps),
  )


def _draw(shape, rng):
  """x of variance 1 and a diagonal that forgets within 10 to 1000 steps."""
  x = rng.randn(2, *shape[:3])
  a_shape = shape[:3] if shape.varying else (shape.states,)
  a = np.exp(-(10 ** rng.uniform(-3, -1, a_shape)) + 1j * rng.uniform(-np.pi, np.pi, a_shape))
  return (*x, a.real, a.imag)
