"""ResNet-18 (He et al. 2016, arXiv 1512.03385), with the ImageNet stem or the CIFAR stem of kuangliu/pytorch-cifar.

Facts not in the paper: projection shortcuts where the shape changes (its option B), kernels from N(0, 2 / fan-out) as
in torchvision, the last BatchNorm scale of every block zero (Goyal et al. 2017; timm's default).
"""

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.conv2d
from lra_jax.models import layers

_STAGES = dict(depths=(2, 2, 2, 2), widths=(64, 128, 256, 512))
RESNET = {
  "resnet18": dict(stem="imagenet", **_STAGES),
  "resnet18_cifar": dict(stem="cifar", **_STAGES),
  # Ours.
  "resnet_digits": dict(stem="cifar", depths=(1, 1, 1), widths=(32, 64, 128)),
}
_kernel_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nnx.Module):
  """Convolution without bias; `padding` pixels of zeros on every side."""

  def __init__(self, in_features: int, features: int, size: int, strides: int, *, implementation=None, dtype, rngs):
    self.strides, self.padding, self.dtype, self.implementation = strides, size // 2, dtype, implementation
    self.kernel = nnx.Param(_kernel_init(rngs.params(), (size, size, in_features, features), jnp.float32))

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    return kernels.conv2d.conv2d(
      x_BHWC.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      strides=self.strides,
      padding=self.padding,
      implementation=self.implementation,
    )


class BasicBlock(nnx.Module):
  """relu(shortcut(x) + BN(conv(relu(BN(conv(x)))))), both convolutions 3 × 3; paper, figure 5, left."""

  def __init__(self, in_features: int, features: int, strides: int, *, implementation, dtype, rngs):
    common = dict(dtype=dtype, rngs=rngs)
    conv = dict(implementation=implementation, **common)
    self.conv1 = Conv(in_features, features, 3, strides, **conv)
    self.norm1 = layers.batch_norm(features, **common)
    self.conv2 = Conv(features, features, 3, 1, **conv)
    self.norm2 = layers.batch_norm(features, **common)
    self.norm2.scale[...] = jnp.zeros_like(self.norm2.scale[...])
    self.shortcut, self.shortcut_norm = nnx.data(None), nnx.data(None)
    if strides != 1 or in_features != features:
      self.shortcut = Conv(in_features, features, 1, strides, **conv)
      self.shortcut_norm = layers.batch_norm(features, **common)

  def __call__(self, x_BHWC: jax.Array, drop_rate: float, key: jax.Array | None, *, train: bool) -> jax.Array:
    running = dict(use_running_average=not train)
    y = jax.nn.relu(self.norm1(self.conv1(x_BHWC), **running))
    y = layers.drop_path(self.norm2(self.conv2(y), **running), drop_rate, key)
    if self.shortcut is not None:
      x_BHWC = self.shortcut_norm(self.shortcut(x_BHWC), **running)
    return jax.nn.relu(x_BHWC + y)


class ResNet(nnx.Module):
  """Stem, stages of basic blocks (the first of every later stage halves the image), mean over the positions, Dense."""

  INPUTS = ("image",)

  def __init__(
    self,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    stem: str,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
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
      stem: "imagenet" (7 × 7 of stride 2, then 3 × 3 max-pooling of stride 2) or "cifar" (3 × 3 of stride 1).
      depths: blocks of every stage.
      widths: channels of every stage.
      drop_path: rate of stochastic depth of the last block, linear from 0 at the first.
      remat: recompute every block in the backward pass instead of keeping its activations.
      implementation: of the convolutions, see `kernels.conv2d`.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).
    """
    self.dtype, self.remat, self.stem = jnp.dtype(dtype), remat, stem
    common = dict(dtype=self.dtype, rngs=rngs)
    size, strides = (7, 2) if stem == "imagenet" else (3, 1)
    self.conv = Conv(input_shape[2], widths[0], size, strides, implementation=implementation, **common)
    self.norm = layers.batch_norm(widths[0], **common)
    self.drop_rates = layers.linear_rates(drop_path, sum(depths))
    blocks, features = [], widths[0]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
      for index in range(depth):
        strides = 2 if stage and not index else 1
        blocks.append(BasicBlock(features, width, strides, implementation=implementation, **common))
        features = width
    self.depths = tuple(depths)
    self.blocks = nnx.List(blocks)
    uniform = layers.torch_uniform(features)
    self.head = nnx.Linear(features, num_classes, kernel_init=uniform, bias_init=uniform, rngs=rngs)

  def __call__(self, x_BHWC: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Normalised images (B, H, W, C) → float32 logits (B, S); `train` takes BatchNorm's statistics from the batch."""
    key = rngs.dropout() if train and self.drop_rates[-1] else None
    x = jax.nn.relu(self.norm(self.conv(x_BHWC), use_running_average=not train))
    if self.stem == "imagenet":
      x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    x = layers.run_blocks(self.blocks, x, key, self.drop_rates, remat=self.remat, train=train)
    return self.head(x.astype(jnp.float32).mean((1, 2)))
