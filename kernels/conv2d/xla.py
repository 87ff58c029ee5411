"""The convolution as patches and one matrix product, with both gradients written by hand.

For 1×1 kernels, whose patches are the image, and for small images this is the fastest form on CPU; for others XLA's
convolution is faster there, except in a loop, where only this one can be used.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.conv2d.reference import Borders


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(x_BHWC: jax.Array, w_RSIO: jax.Array, strides: int, borders: Borders) -> jax.Array:
  """Convolution of images and a kernel of one dtype, with `borders` zeros before and after rows and columns."""
  return jnp.einsum("bhwp,po->bhwo", _patches(x_BHWC, w_RSIO.shape[:2], strides, borders), _matrix(w_RSIO))


def _forward(x_BHWC, w_RSIO, strides, borders):
  return convolution(x_BHWC, w_RSIO, strides, borders), (x_BHWC, w_RSIO)


def _backward(strides, borders, residuals, dy_BHWO):
  """The patches are made anew: to keep them would take R·S times the memory of the image."""
  x_BHWC, w_RSIO = residuals
  patches_BHWP = _patches(x_BHWC, w_RSIO.shape[:2], strides, borders)
  dw_PO = jnp.einsum("bhwp,bhwo->po", patches_BHWP, dy_BHWO, preferred_element_type=jnp.float32)
  # Gradients of the patches, each put back to where it was taken from. The other way, patches of dy (with zeros between
  # its pixels for strides > 1) times the flipped kernel, is slower where O > C or strides > 1 and nowhere faster.
  dpatches_BHWP = jnp.einsum("bhwo,po->bhwp", dy_BHWO, _matrix(w_RSIO))
  dx_BHWC = _put_back(dpatches_BHWP, x_BHWC.shape, w_RSIO.shape[:2], strides, borders)
  return dx_BHWC, dw_PO.reshape(w_RSIO.shape).astype(w_RSIO.dtype)


convolution.defvjp(_forward, _backward)


def _matrix(w_RSIO):
  """The kernel as (P, O) with P = R·S·I."""
  return w_RSIO.reshape(-1, w_RSIO.shape[-1])


def _patches(x_BHWC, kernel, strides, borders):
  """For every output pixel the inputs that it sees: (B, H', W', R·S·C)."""
  x = jnp.pad(x_BHWC, ((0, 0), *borders, (0, 0)))
  batch, height, width, channels = x.shape
  bottom, right = height - kernel[0] + 1, width - kernel[1] + 1
  views = [
    lax.slice(x, (0, r, s, 0), (batch, r + bottom, s + right, channels), (1, strides, strides, 1))
    for r in range(kernel[0])
    for s in range(kernel[1])
  ]
  return jnp.concatenate(views, axis=-1)


def _put_back(patches_BHWP, shape, kernel, strides, borders):
  """The transpose of `_patches`: (B, H, W, C) = `shape`. Sums are float32."""
  rows, columns, channels = *patches_BHWP.shape[1:3], shape[-1]
  height, width = (size + sum(border) for size, border in zip(shape[1:3], borders, strict=True))
  total = None
  for index, (r, s) in enumerate((r, s) for r in range(kernel[0]) for s in range(kernel[1])):
    view = patches_BHWP[..., index * channels : (index + 1) * channels].astype(jnp.float32)
    ends = (height - r - (rows - 1) * strides - 1, width - s - (columns - 1) * strides - 1)
    config = ((0, 0, 0), (r, ends[0], strides - 1), (s, ends[1], strides - 1), (0, 0, 0))
    view = lax.pad(view, jnp.zeros((), jnp.float32), config)
    total = view if total is None else total + view
  (top, _), (left, _) = borders
  return total[:, top : top + shape[1], left : left + shape[2]].astype(patches_BHWP.dtype)
