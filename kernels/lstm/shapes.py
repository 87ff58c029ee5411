"""Real shapes of the operation: Sequencer2D-S at 224 px, our presets at 32 px, and long sequences of two directions."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels.lstm
from kernels.cases import Case


class Shape(NamedTuple):
  """B images of H rows and W columns, C input channels, K hidden units of each of the four directions."""

  batch: int
  rows: int
  columns: int
  channels: int
  hidden: int


class Sequences(NamedTuple):
  """B sequences of T steps, C input channels, K hidden units of each of the two directions."""

  batch: int
  steps: int
  channels: int
  hidden: int


BILSTM2D = {
  "sequencer2d_s_stage1": Shape(64, 32, 32, 192, 48),
  "sequencer2d_s_stage2": Shape(64, 16, 16, 384, 96),
  "sequencer2d_small32_stage1": Shape(64, 16, 16, 192, 48),
  "sequencer2d_small32_stage2": Shape(64, 8, 8, 384, 96),
  "sequencer2d_tiny32_stage1": Shape(64, 16, 16, 96, 24),
}
LSTM = {
  "steps1024_hidden128_batch64": Sequences(64, 1024, 128, 128),
  "steps1024_hidden128_batch256": Sequences(256, 1024, 128, 128),
  "steps1024_hidden256_batch64": Sequences(64, 1024, 256, 256),
}


def cases() -> Iterator[Case]:
  """Every shape in both dtypes; weights are float32 as in the models."""
  for dtype in (jnp.float32, jnp.bfloat16):
    for name, shape in BILSTM2D.items():
      yield _case(name, dtype, kernels.lstm.bilstm2d, 4, shape.hidden, shape[:4], max(shape.rows, shape.columns))
    for name, shape in LSTM.items():
      yield _case(name, dtype, kernels.lstm.lstm, 2, shape.hidden, shape[:3], shape.steps)


def _case(name, dtype, operation, directions, hidden, x_shape, steps):
  channels, positions = x_shape[-1], math.prod(x_shape[:-1])
  gates = directions * 4 * hidden

  def run(*arguments, implementation):
    return operation(*arguments, implementation=implementation)

  def draw(rng: np.random.RandomState):
    shapes = [(channels, directions, 4 * hidden), (directions, hidden, 4 * hidden), *[(directions, 4 * hidden)] * 2]
    return rng.randn(*x_shape), *(rng.uniform(-(hidden**-0.5), hidden**-0.5, shape) for shape in shapes)

  # The arrays of all positions; weights are small beside them. Forward: x in, pre-activations out and in, states out.
  # With the gradient: gates and cell states kept and read once more, the states' gradient in, that of the
  # pre-activations out, and in again for each of three products, with x and the states as their other sides; dx out.
  x, z, y = (positions * width * jnp.dtype(dtype).itemsize for width in (channels, gates, directions * hidden))
  forward = x + 2 * z + y
  # Products: of the input with its weights, and in every direction of the states with theirs; twice as much for the
  # gradients.
  operations = 2 * positions * gates * (channels + hidden)
  return Case(
    operation="lstm",
    name=name,
    dtype=dtype,
    run=run,
    draw=draw,
    arguments=(
      jax.ShapeDtypeStruct(x_shape, dtype),
      jax.ShapeDtypeStruct((channels, directions, 4 * hidden), jnp.float32),
      jax.ShapeDtypeStruct((directions, hidden, 4 * hidden), jnp.float32),
      *[jax.ShapeDtypeStruct((directions, 4 * hidden), jnp.float32)] * 2,
    ),
    implementations=("xla", "mosaic", "cudnn"),
    batched=(True, False, False, False, False),
    differentiate=(0, 1, 2, 3, 4),
    transferred=(forward, forward + 2 * (z + y) + y + 4 * z + x + y + x),
    operations=(operations, 3 * operations),
    steps=(steps, 2 * steps),
  )
