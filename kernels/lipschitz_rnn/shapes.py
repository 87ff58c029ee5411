"""Real shapes of the operation, and its cases."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cases import Case
from kernels.lipschitz_rnn import lipschitz_rnn, rule


class Shape(NamedTuple):
  """B sequences of T steps, D hidden units; the method, whether gated, and whether only the last state is wanted."""

  batch: int
  steps: int
  width: int
  method: str = "euler"
  gated: bool = False
  last: bool = True


LIPSCHITZ_RNN = {
  "cifar10_sequence_128": Shape(128, 1024, 128),  # 1024 pixels, as in the Image task of the Long Range Arena
  "cifar10_sequence_128_states": Shape(128, 1024, 128, last=False),
  "cifar10_sequence_128_midpoint": Shape(128, 1024, 128, method="midpoint"),
  "cifar10_sequence_128_rk4": Shape(128, 1024, 128, method="rk4"),
  "cifar10_sequence_128_gated": Shape(128, 1024, 128, gated=True),
  "cifar10_sequence_64": Shape(128, 1024, 64),
  "cifar10_sequence_256": Shape(128, 1024, 256),
  "cifar10_sequence_256_midpoint": Shape(128, 1024, 256, method="midpoint"),
  "cifar10_sequence_256_gated": Shape(128, 1024, 256, gated=True),
  "pathx_128": Shape(16, 16384, 128),
  "digits": Shape(64, 64, 128),
}
EPSILON = 0.03


def cases() -> Iterator[Case]:
  """Every shape in float32 and bfloat16."""
  for name, shape in LIPSCHITZ_RNN.items():
    for dtype in (jnp.float32, jnp.bfloat16):
      yield _case(name, shape, dtype)


def _case(name, shape, dtype):
  batch, steps, width = shape[:3]
  inputs = 1 + shape.gated
  spec = jax.ShapeDtypeStruct((batch, steps, width), dtype)
  matrix = jax.ShapeDtypeStruct((width, width), jnp.float32)
  stages = len(rule.METHODS[shape.method].weights)
  array = batch * steps * width * jnp.dtype(dtype).itemsize
  # Forward: the inputs are read and, if wanted, the states written. With gradient: the states are written, or they are
  # the result; the inputs and states are read again, and the inputs' gradients written.
  forward = array * (inputs + (not shape.last))
  both = array * (inputs + 1 + inputs + 1 + inputs)
  # Products of a (B·T, D) array and a (D, D) matrix: two at every stage in the forward and in the backward loop,
  # and after that (gradients of A and W); before it h W, and h A but for the last stage of an ungated method.
  product = 2 * batch * steps * width**2
  again = 2 * stages - (not shape.gated)
  # Float32 matrices of 256 units do not fit a multiprocessor.
  fits = width <= 128 or dtype == jnp.bfloat16
  return Case(
    "lipschitz_rnn",
    name,
    dtype,
    functools.partial(_run, shape),
    functools.partial(_draw, shape),
    (spec,) * inputs + (matrix,) * 2,
    ("xla", "mosaic") if fits else ("xla",),
    (True,) * inputs + (False,) * 2,
    tuple(range(inputs + 2)),
    (forward, both),
    (2 * stages * product, (6 * stages + again) * product),
    (stages * steps, 2 * stages * steps),
  )


def _run(shape, *arguments, implementation):
  z, *gate, a, w = arguments
  return lipschitz_rnn(
    z,
    a,
    w,
    epsilon=EPSILON,
    method=shape.method,
    gate_BTD=gate[0] if gate else None,
    last=shape.last,
    implementation=implementation,
  )


def _draw(shape, rng):
  """Inputs of variance 1; A and W skew-symmetric but for a decay, so that states and gradients do not grow."""
  inputs = [rng.randn(*shape[:3]) for _ in range(1 + shape.gated)]
  matrices = []
  for scale in (1.0, 0.5):
    m = scale * rng.randn(shape.width, shape.width) / shape.width**0.5
    matrices.append((m - m.T) / 2 - 0.5 * np.eye(shape.width))
  return (*inputs, *matrices)
