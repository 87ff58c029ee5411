"""What the tests of fft_mixing's Mosaic kernels share: inputs, NumPy's transform in float64, the distance to it."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cases
from kernels.fft_mixing import fft_mixing

# Relative to the norm; the interpreter does not round to TF32.
BOUNDS = {jnp.float32: cases.BOUNDS["tf32"], jnp.bfloat16: cases.BOUNDS["bfloat16"]}
every_dtype = pytest.mark.parametrize("dtype", list(BOUNDS))


def truth(x_BLD):
  return np.fft.fft2(np.asarray(x_BLD, np.float64)).real


def error(x, y):
  return np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)


def normal(shape, dtype, seed):
  return jnp.asarray(np.random.RandomState(seed).randn(*shape), dtype)


def on_kernel(x_BLD):
  return fft_mixing(x_BLD, implementation="mosaic")
