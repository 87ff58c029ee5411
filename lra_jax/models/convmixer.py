"""ConvMixer (Trockman & Kolter 2022, arXiv 2201.09792).

The order convolution, activation, BatchNorm is the paper's, and that of its code (locuslab/convmixer) and timm; weights
start as PyTorch's layers do. Released ImageNet weights of 768/32 use ReLU instead of GELU.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.depthwise_conv
from lra_jax import errors
from lra_jax.models import layers

# Width / depth; kernel and patch of the paper's tables 1 (ImageNet) and 4 (CIFAR-10), and of the Imagenette study
# (256/12).
CONVMIXER = {
  "convmixer_256_8": dict(width=256, depth=8, kernel_size=5, patch_size=2),
  "convmixer_256_12": dict(width=256, depth=12, kernel_size=7, patch_size=7),
  "convmixer_768_32": dict(width=768, depth=32, kernel_size=7, patch_size=7, activation="relu"),
  "convmixer_1024_20": dict(width=1024, depth=20, kernel_size=9, patch_size=14),
  "convmixer_1536_20": dict(width=1536, depth=20, kernel_size=9, patch_size=7),
  # Ours.
  "convmixer_digits": dict(width=64, depth=4, kernel_size=3, patch_size=1),
}
ACTIVATIONS = {"gelu": layers.gelu, "relu": jax.nn.relu}


class Block(nnx.Module):
  """x + BN(σ(depthwise(x))), then BN(σ(pointwise(·))); paper, equations 2 and 3."""

  def __init__(self, width: int, kernel_size: int, activation: str, implementation: str | None, *, dtype, rngs):
    self.dtype, self.activation, self.implementation = dtype, activation, implementation
    uniform = layers.torch_uniform(kernel_size**2)
    self.w_depthwise = nnx.Param(uniform(rngs.params(), (kernel_size, kernel_size, width)))
    self.bias = nnx.Param(uniform(rngs.params(), (width,)))
    self.norm1 = layers.batch_norm(width, dtype=jnp.float32, rngs=rngs)
    self.pointwise = layers.torch_linear(width, width, dtype=dtype, rngs=rngs)
    self.norm2 = layers.batch_norm(width, dtype=jnp.float32, rngs=rngs)

  def __call__(self, x_BHWD: jax.Array, drop_rate: float, key: jax.Array | None, *, train: bool) -> jax.Array:
    act = ACTIVATIONS[self.activation]
    x = x_BHWD.astype(self.dtype)
    y = kernels.depthwise_conv.depthwise_conv2d(
      x, self.w_depthwise[...].astype(x.dtype), implementation=self.implementation
    )
    # Between the products all is float32: BatchNorm divides by what little spread the rounded values have.
    y = self.norm1(act(y.astype(jnp.float32) + self.bias[...].reshape(1, 1, 1, -1)), use_running_average=not train)
    x_BHWD = x_BHWD + layers.drop_path(y, drop_rate, key)
    return self.norm2(act(self.pointwise(x_BHWD).astype(jnp.float32)), use_running_average=not train)


class ConvMixer(nnx.Module):
  """Patches, activation and BatchNorm, blocks, mean over the positions, Dense."""

  INPUTS = ("image",)

  def __init__(
    self,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    width: int,
    depth: int,
    kernel_size: int,
    patch_size: int,
    activation: str = "gelu",
    drop_path: float = 0.0,
    remat: bool = False,
    implementation: str | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: (H, W, C) of an image.
      num_classes: width of the head.
      width: D.
      depth: number of blocks.
      kernel_size: of the depthwise convolution, in patches; padded so that the size stays.
      patch_size: pixels.
      activation: "gelu" or "relu".
      drop_path: rate of stochastic depth of the last depthwise branch, linear from 0 (not in the paper).
      remat: recompute every block in the backward pass instead of keeping its activations.
      implementation: of the depthwise convolution, see `kernels.depthwise_conv`.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: an unknown activation, or a patch that does not fit the image.
    """
    errors.check_known("config.model.activation:", activation, ACTIVATIONS)
    layers.check_patch(patch_size, *input_shape[:2])
    self.dtype, self.remat, self.activation = jnp.dtype(dtype), remat, activation
    common = dict(dtype=self.dtype, rngs=rngs)
    uniform = layers.torch_uniform(patch_size**2 * input_shape[2])
    self.embed = layers.PatchEmbed(input_shape[2], width, patch_size, kernel_init=uniform, bias_init=uniform, **common)
    self.norm = layers.batch_norm(width, dtype=jnp.float32, rngs=rngs)
    self.drop_rates = layers.linear_rates(drop_path, depth)
    self.blocks = nnx.List(Block(width, kernel_size, activation, implementation, **common) for _ in range(depth))
    uniform = layers.torch_uniform(width)
    self.head = nnx.Linear(width, num_classes, kernel_init=uniform, bias_init=uniform, rngs=rngs)

  def __call__(self, x_BHWC: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Normalised images (B, H, W, C) → float32 logits (B, S); `train` takes BatchNorm's statistics from the batch."""
    key = rngs.dropout() if train and self.drop_rates[-1] else None
    x = ACTIVATIONS[self.activation](self.embed(x_BHWC).astype(jnp.float32))
    x = self.norm(x, use_running_average=not train)
    x = layers.run_blocks(self.blocks, x, key, self.drop_rates, remat=self.remat, train=train)
    return self.head(x.astype(jnp.float32).mean((1, 2)))
