"""The plainest form: XLA's own convolution with as many feature groups as channels."""

import jax
from jax import lax


def convolution(x_BHWC: jax.Array, w_RSC: jax.Array) -> jax.Array:
  """Depthwise convolution of images and kernels of one dtype: (B, H, W, C) in that dtype."""
  return lax.conv_general_dilated(
    x_BHWC,
    w_RSC[:, :, None],
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x_BHWC.shape[-1],
  )
