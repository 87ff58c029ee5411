"""Shapes of the operation: FNet-Base as published, LRA's Image, Text and Path-X, digits, and the corners."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import cases as common


class Shape(NamedTuple):
  """B sequences of L tokens, D channels."""

  batch: int
  tokens: int
  width: int


FFT_MIXING = {
  "digits": Shape(64, 64, 64),
  "fnet_tokens256_width128": Shape(64, 256, 128),
  "fnet_lra_image": Shape(64, 1024, 256),
  "fnet_tokens256_width1024": Shape(64, 256, 1024),
  "fnet_base": Shape(64, 512, 768),
  "fnet_tokens1024_width1024": Shape(16, 1024, 1024),
  "fnet_lra_text": Shape(32, 4096, 256),
  "fnet_tokens4096_width1024": Shape(4, 4096, 1024),
  "fnet_path_x": Shape(8, 16384, 128),
}


def cases() -> Iterator[common.Case]:
  """All shapes in float32 and bfloat16; "mosaic" where it serves."""
  from kernels.fft_mixing import fft_mixing, mosaic

  for name, shape in FFT_MIXING.items():
    batch, tokens, width = shape
    for dtype in (jnp.float32, jnp.bfloat16):
      x_BLD = jax.ShapeDtypeStruct(shape, dtype)
      serves = () if mosaic.refuse(x_BLD) else ("mosaic",)
      # x is read and y written; the gradient does the same with dy and dx.
      transferred = 2.0 * x_BLD.size * x_BLD.dtype.itemsize
      # Two products each with quarter matrices of D and with halves of quarter matrices of L for every half of y; or,
      # in two levels, of complex numbers for half of the tokens and for half of the columns.
      levels = mosaic.levels(tokens, width)
      by_length = 2 * levels[0] + levels[1] if levels else tokens / mosaic.halves(tokens)
      operations = batch * tokens * width * (width / 2 + by_length)
      yield common.Case(
        operation="fft_mixing",
        name=name,
        dtype=dtype,
        run=fft_mixing,
        draw=lambda rng, shape=shape: (rng.randn(*shape),),
        arguments=(x_BLD,),
        implementations=("reference", "xla", "half", "folded", *serves),
        batched=(True,),
        differentiate=(0,),
        transferred=(transferred, 2 * transferred),
        operations=(operations, 2 * operations),
      )
