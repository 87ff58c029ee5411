"""Real shapes of the operation: presets of our models, tasks of the Long Range Arena, BERT size, and corners."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cases import Case
from kernels.nystrom_attention import nystrom_attention


class Shape(NamedTuple):
  """B sequences of L tokens, N heads of width K, M landmarks, R taps of the skip convolution (0 for none)."""

  batch: int
  tokens: int
  heads: int
  width: int
  landmarks: int
  taps: int
  masked: bool = False


NYSTROM_ATTENTION = {
  "digits": Shape(64, 16, 2, 32, 8, 5),
  "nystromformer_tiny32": Shape(64, 256, 3, 64, 32, 0),
  "lra_image": Shape(256, 1024, 2, 32, 64, 35),
  "lra_text": Shape(32, 4096, 2, 32, 128, 35, masked=True),
  "lra_retrieval": Shape(64, 4096, 2, 32, 64, 35, masked=True),  # 32 pairs of documents
  "bert": Shape(8, 4096, 12, 64, 64, 65),
  "tokens16384": Shape(4, 16_384, 2, 32, 64, 35),
  "tokens16384_heads8": Shape(1, 16_384, 8, 64, 128, 0),
  "ragged_width128": Shape(16, 2001, 2, 128, 128, 0),
}


def cases() -> Iterator[Case]:
  """Every shape in float32 and bfloat16."""
  for name, shape in NYSTROM_ATTENTION.items():
    for dtype in (jnp.float32, jnp.bfloat16):
      yield _case(name, shape, dtype)


def _case(name: str, shape: Shape, dtype) -> Case:
  from kernels.nystrom_attention import mosaic  # not above: it loads Pallas

  tokens = jax.ShapeDtypeStruct(shape[:4], dtype)
  weights = [jax.ShapeDtypeStruct((shape.taps, shape.heads), dtype)] if shape.taps else []
  mask = [jax.ShapeDtypeStruct(shape[:2], jnp.int32)] if shape.masked else []
  refused = mosaic.refuse(tokens, tokens, tokens, shape.landmarks)
  return Case(
    operation="nystrom_attention",
    name=name,
    dtype=dtype,
    run=functools.partial(_run, shape),
    draw=functools.partial(draw, shape),
    arguments=(tokens, tokens, tokens, *weights, *mask),
    implementations=("reference", "xla") if refused else ("reference", "xla", "mosaic"),
    batched=(True,) * 3 + (False,) * len(weights) + (True,) * len(mask),
    differentiate=tuple(range(3 + len(weights))),
    transferred=_transferred(shape, jnp.dtype(dtype).itemsize),
    operations=_operations(shape),
  )


def _run(shape, q, k, v, *others, implementation):
  others = list(others)
  weights = others.pop(0) if shape.taps else None
  mask = others.pop(0) if shape.masked else None
  return nystrom_attention(q, k, v, weights, landmarks=shape.landmarks, mask_BL=mask, implementation=implementation)


def draw(shape: Shape, rng: np.random.RandomState) -> tuple[np.ndarray, ...]:
  """q, k and v, and the skip filter and the mask of those shapes that have them, float64 or int64.

  Queries and keys of a segment resemble each other. Were all independent, the matrix of the landmarks could be nearly
  singular, and its inverse would blow up the rounding errors of any form.
  """
  size = -(-shape.tokens // shape.landmarks)
  means = np.repeat(rng.randn(shape.batch, shape.landmarks, *shape[2:4]), size, 1)[:, : shape.tokens]
  q, k = (means + 0.5 * rng.randn(*shape[:4]) for _ in range(2))
  drawn = [q, k, rng.randn(*shape[:4])]
  if shape.taps:
    drawn.append(rng.randn(shape.taps, shape.heads) / shape.taps**0.5)
  if shape.masked:
    lengths = rng.randint(shape.tokens // 2, shape.tokens + 1, (shape.batch, 1))
    drawn.append((np.arange(shape.tokens) < lengths).astype(np.int64))
  return tuple(drawn)


def _transferred(shape, itemsize):
  """q, k and v read and the result written; for the gradient q, k, v and the result's read, and theirs written."""
  array = shape.batch * shape.tokens * shape.heads * shape.width * itemsize
  mask = shape.batch * shape.tokens * 4 * shape.masked
  return 4 * array + mask, 11 * array + 2 * mask


def _operations(shape):
  """Two for every multiplication of a product.

  With tokens: scores and values, of both softmaxes, 4 products of L·M·K; their gradients compute 10, 11 where there
  are more than 64 landmarks. Without: scores, the product of inverse and values, and 4 of M³ in each of the six steps
  of the inverse; gradients take twice as much. So does the gradient of the skip convolution.
  """
  sequences = shape.batch * shape.heads
  tokens = 2 * sequences * shape.tokens * shape.landmarks * shape.width
  landmarks = 2 * sequences * shape.landmarks**2 * (2 * shape.width + 24 * shape.landmarks)
  skip = 2 * sequences * shape.tokens * shape.width * shape.taps
  forward = 4 * tokens + landmarks + skip
  return forward, forward + (10 + (shape.landmarks > 64)) * tokens + 2 * landmarks + 2 * skip
