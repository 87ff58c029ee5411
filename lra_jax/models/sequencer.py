"""Sequencer2D and VanillaSequencer (Tatsunami & Taki 2022, arXiv 2205.01972).

Facts not in the paper are those of its code (okojoalg/sequencer) and of timm: LayerNorm epsilon 1e-6, exact GELU, no
norm after the stem or after downsampling, downsampling of later stages also where its patch is 1, zero head, stochastic
depth linear over all blocks (as in the official code; timm's is constant).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lra_jax import errors
from lra_jax.models import layers

LAYER_NORM_EPSILON = 1e-6

# Table 1 and appendix of the paper; XS is not in it. One entry a stage.
_PYRAMID = dict(patch_sizes=(7, 2, 1, 1), embed_dims=(192, 384, 384, 384), hidden_sizes=(48, 96, 96, 96))
_PYRAMID_32 = _PYRAMID | dict(patch_sizes=(2, 2, 1, 1))

SEQUENCER2D = {
  "sequencer2d_xs": dict(depths=(2, 2, 4, 3), drop_path=0.1, **_PYRAMID),
  "sequencer2d_s": dict(depths=(4, 3, 8, 3), drop_path=0.1, **_PYRAMID),
  "sequencer2d_m": dict(depths=(4, 3, 14, 3), drop_path=0.2, **_PYRAMID),
  "sequencer2d_l": dict(depths=(8, 8, 16, 4), drop_path=0.4, **_PYRAMID),
  # Ours, for small images: patch 7 would leave 4 × 4 tokens of a 32 px image, too few for an LSTM to be of use.
  # At 32 px these have 16 × 16 tokens, then 8 × 8; at 64 px 32 × 32, then 16 × 16, as the paper's at 224 px.
  "sequencer2d_small32": dict(depths=(2, 2, 4, 3), drop_path=0.1, **_PYRAMID_32),
  "sequencer2d_small64": dict(depths=(4, 3, 8, 3), drop_path=0.1, **_PYRAMID_32),
  "sequencer2d_tiny32": dict(
    depths=(2, 2, 3, 2),
    drop_path=0.05,
    patch_sizes=(2, 2, 1, 1),
    embed_dims=(96, 192, 192, 192),
    hidden_sizes=(24, 48, 48, 48),
  ),
  "sequencer2d_digits": dict(
    depths=(2, 2), drop_path=0.0, patch_sizes=(2, 1), embed_dims=(48, 96), hidden_sizes=(12, 24)
  ),
}

_FLAT = dict(depths=(4, 3, 8, 3), drop_path=0.1)
VANILLA_SEQUENCER = {
  "vanilla_sequencer_s": dict(
    patch_sizes=(14, 1, 1, 1), embed_dims=(384,) * 4, hidden_sizes=(192,) * 4, position=False, **_FLAT
  ),
  "vanilla_sequencer_s_h": dict(
    patch_sizes=(7, 2, 1, 1), embed_dims=(192, 384, 384, 384), hidden_sizes=(96, 192, 192, 192), position=False, **_FLAT
  ),
  "vanilla_sequencer_s_pe": dict(
    patch_sizes=(14, 1, 1, 1), embed_dims=(384,) * 4, hidden_sizes=(192,) * 4, position=True, **_FLAT
  ),
  # Ours: 256 tokens of a 32 px image, and 64 of an 8 px one.
  "vanilla_sequencer_tiny32": dict(
    patch_sizes=(2,), embed_dims=(192,), hidden_sizes=(96,), depths=(6,), drop_path=0.05, position=True
  ),
  "vanilla_sequencer_digits": dict(
    patch_sizes=(1,), embed_dims=(64,), hidden_sizes=(32,), depths=(3,), drop_path=0.0, position=True
  ),
}


class Block(nnx.Module):
  """x + LSTM(LN(x)), then x + MLP(LN(x)); paper, figure 2."""

  def __init__(self, features, hidden, mlp_ratio, *, two_dimensional, unroll, implementation, dtype, rngs):
    self.norm1 = layers.layer_norm(features, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
    directions = 4 if two_dimensional else 2
    self.lstm = layers.Lstm(features, hidden, directions, unroll=unroll, implementation=implementation, rngs=rngs)
    # BiLSTM2D joins its four directions by a Dense layer; the vanilla block's 2K states already are the width.
    self.fc = layers.linear(4 * hidden, features, dtype=dtype, rngs=rngs) if two_dimensional else None
    self.norm2 = layers.layer_norm(features, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.mlp = layers.Mlp(features, int(mlp_ratio * features), dtype=dtype, rngs=rngs)

  def __call__(self, x_BHWD, drop_rate, key):
    """Args: x_BHWD; drop_rate of the stochastic depth of both branches; its key, or None where nothing is dropped."""
    key1, key2 = layers.split(key, 2)
    y = self.norm1(x_BHWD)
    if self.fc is not None:
      y = self.fc(self.lstm(y))
    else:
      y = self.lstm(y.reshape(y.shape[0], -1, y.shape[-1])).reshape(y.shape)
    x_BHWD = x_BHWD + layers.drop_path(y, drop_rate, key1)
    return x_BHWD + layers.drop_path(self.mlp(self.norm2(x_BHWD)), drop_rate, key2)


class Sequencer(nnx.Module):
  """Stages of patch embedding and blocks, then LayerNorm, mean over the tokens, Dense."""

  INPUTS = ("image",)

  def __init__(
    self,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    depths: tuple[int, ...],
    patch_sizes: tuple[int, ...],
    embed_dims: tuple[int, ...],
    hidden_sizes: tuple[int, ...],
    two_dimensional: bool,
    position: bool = False,
    mlp_ratio: float = 3.0,
    drop_path: float = 0.0,
    remat: bool = False,
    unroll: int = 1,
    implementation: str | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: (H, W, C) of an image.
      num_classes: width of the head.
      depths: blocks of every stage.
      patch_sizes: kernel size and stride of the embedding that starts every stage.
      embed_dims: width D of every stage.
      hidden_sizes: LSTM units K per direction of every stage.
      two_dimensional: BiLSTM2D over rows and columns, else one BiLSTM over the tokens in raster order.
      position: a learned position embedding after the stem (VanillaSequencer-PE).
      mlp_ratio: hidden width of the MLP by D.
      drop_path: rate of stochastic depth of the last block; 0 at the first, linear between.
      remat: recompute every block in the backward pass instead of keeping its activations.
      unroll: LSTM steps in one iteration of its loop.
      implementation: of the LSTM, see `kernels.lstm`.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: stages that do not fit each other or the image.
    """
    stages = {"depths": depths, "patch_sizes": patch_sizes, "embed_dims": embed_dims, "hidden_sizes": hidden_sizes}
    if len({len(v) for v in stages.values()}) != 1:
      raise errors.UserError(
        f"config.model: {', '.join(f'{k}={tuple(v)}' for k, v in stages.items())} differ in length; one entry per stage"
      )
    if not two_dimensional and any(2 * k != d for k, d in zip(hidden_sizes, embed_dims, strict=True)):
      raise errors.UserError(
        f"config.model.hidden_sizes={tuple(hidden_sizes)}: VanillaSequencer needs half of "
        f"embed_dims={tuple(embed_dims)}"
      )
    rows, columns, channels = input_shape
    self.remat = remat
    self.dtype = jnp.dtype(dtype)
    self.drop_rates = layers.linear_rates(drop_path, sum(depths))
    embeds, stage_blocks = [], []
    for stage, (depth, patch, features, hidden) in enumerate(
      zip(depths, patch_sizes, embed_dims, hidden_sizes, strict=True)
    ):
      if patch > min(rows, columns):
        raise errors.UserError(
          f"config.model.patch_sizes={tuple(patch_sizes)}: stage {stage + 1} gets {rows}×{columns} tokens of an image "
          f"of {input_shape[0]}×{input_shape[1]} px, fewer than its patch; take smaller patches or another variant"
        )
      embeds.append(layers.PatchEmbed(channels, features, patch, dtype=self.dtype, rngs=rngs))
      rows, columns, channels = rows // patch, columns // patch, features
      if stage == 0:
        draw = nnx.initializers.truncated_normal(0.02)
        self.position = nnx.data(
          nnx.Param(draw(rngs.params(), (rows, columns, features), jnp.float32)) if position else None
        )
      stage_blocks.append(
        nnx.List(
          Block(
            features,
            hidden,
            mlp_ratio,
            two_dimensional=two_dimensional,
            unroll=unroll,
            implementation=implementation,
            dtype=self.dtype,
            rngs=rngs,
          )
          for _ in range(depth)
        )
      )
    self.embeds = nnx.List(embeds)
    self.stages = nnx.List(stage_blocks)
    self.norm = layers.layer_norm(channels, epsilon=LAYER_NORM_EPSILON, dtype=self.dtype, rngs=rngs)
    self.head = nnx.Linear(channels, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

  def __call__(self, x_BHWC: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Class scores.

    Args:
      x_BHWC: normalised images, float32.
      train: whether stochastic depth is on.
      rngs: stream `dropout`, needed where `train` is true and the rate of stochastic depth is not zero.

    Returns:
      (B, S) float32 logits.
    """
    key = rngs.dropout() if train and self.drop_rates[-1] > 0 else None
    first = 0
    x = x_BHWC
    for stage, (embed, blocks) in enumerate(zip(self.embeds, self.stages, strict=True)):
      x = embed(x)
      if stage == 0 and self.position is not None:
        x = x + self.position[...].astype(x.dtype)[None]
      own = None if key is None else jax.random.fold_in(key, stage)
      x = layers.run_blocks(blocks, x, own, self.drop_rates[first : first + len(blocks)], remat=self.remat)
      first += len(blocks)
    x = self.norm(x)
    return self.head(x.astype(jnp.float32).mean((1, 2)))
