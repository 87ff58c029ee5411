"""What S5 and LRU share: a deep stack around a linear recurrence.

Per layer, with skip: norm, recurrence, GELU, gate; then the mean over time and a Dense layer. Facts are those of the
official code of S5 (lindermanlab/S5) and of minimal-LRU: no norm after the last layer, GELU by tanh, dropout masks
shared by all steps of a sequence. Orvieto et al. (2023, section 3) show that this stack, not the cell, makes most of
the accuracy.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lra_jax import errors
from lra_jax.models import layers

ACTIVATIONS = ("full_glu", "half_glu1", "half_glu2", "gelu")
LAYER_NORM_EPSILON = 1e-6


class Layer(nnx.Module):
  """One layer of the stack around `cell`, a module (B, L, D) → (B, L, D)."""

  def __init__(self, cell, width, *, norm, norm_momentum, prenorm, activation, dropout, dtype, rngs):
    self.cell = cell
    self.prenorm, self.activation, self.dropout = prenorm, activation, dropout
    common = dict(dtype=dtype, rngs=rngs)
    if norm == "batch":
      self.norm = layers.batch_norm(width, momentum=norm_momentum, **common)
    else:
      self.norm = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, **common)
    gate = dict(kernel_init=layers.lecun_normal, **common)
    self.out1 = nnx.data(layers.linear(width, width, **gate) if activation == "full_glu" else None)
    self.out2 = nnx.data(layers.linear(width, width, **gate) if activation != "gelu" else None)

  def __call__(
    self,
    x_BLD: jax.Array,
    drop_rate: float,
    key: jax.Array | None,
    *,
    train: bool,
    mask_BL: jax.Array | None = None,
  ) -> jax.Array:
    key1, key2, key3 = layers.split(key, 3)

    def drop(x, key):
      return layers.dropout(x, self.dropout, key, broadcast=(1,))

    def norm(x):
      if not isinstance(self.norm, nnx.BatchNorm):
        return self.norm(x)
      mask = None if mask_BL is None else mask_BL[..., None]  # padding does not count in the statistics
      return self.norm(x, use_running_average=not train, mask=mask)

    y = self.cell(layers.zero_padding(norm(x_BLD) if self.prenorm else x_BLD, mask_BL))
    if self.activation == "full_glu":
      y = drop(layers.gelu_tanh(y), key1)
      y = self.out1(y) * jax.nn.sigmoid(self.out2(y))
    elif self.activation == "half_glu1":
      y = drop(layers.gelu_tanh(y), key1)
      y = y * jax.nn.sigmoid(self.out2(y))
    elif self.activation == "half_glu2":
      y = y * jax.nn.sigmoid(self.out2(drop(layers.gelu_tanh(y), key1)))
    else:
      y = layers.gelu_tanh(y)
    x_BLD = x_BLD + layers.drop_path(drop(y, key2), drop_rate, key3)
    return x_BLD if self.prenorm else norm(x_BLD)


class Stack(nnx.Module):
  """Dense or embedding, layers, pooling over time, Dense."""

  INPUTS = ("image", "sequence", "tokens")
  READS_SHORTER = True

  def __init__(
    self,
    make_cell,
    *,
    input_shape,
    num_classes,
    vocab_size,
    width,
    depth,
    patch_size,
    norm,
    norm_momentum,
    prenorm,
    activation,
    pool,
    dropout,
    drop_path,
    remat,
    dtype,
    rngs,
  ):
    """Args: make_cell, called once a layer; the others as documented in `s5.S5` and `lru.Lru`."""
    for name, value, known in (
      ("activation", activation, ACTIVATIONS),
      ("norm", norm, ("batch", "layer")),
      ("pool", pool, ("mean", "last")),
    ):
      errors.check_known(f"config.model.{name}:", value, known)
    self.remat, self.pool = remat, pool
    common = dict(dtype=dtype, rngs=rngs)
    self.encoder = layers.Tokenizer(
      input_shape, width, patch=patch_size, vocab_size=vocab_size, embed_std=1.0, **common
    )
    self.drop_rates = layers.linear_rates(drop_path, depth)
    self.blocks = nnx.List(
      Layer(
        make_cell(),
        width,
        norm=norm,
        norm_momentum=norm_momentum,
        prenorm=prenorm,
        activation=activation,
        dropout=dropout,
        **common,
      )
      for _ in range(depth)
    )
    self.head = nnx.Linear(width, num_classes, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """(B, *input_shape) → float32 logits (B, S); `rngs` (stream `dropout`) is needed where `train` is true.

    `mask_BL` is False where a step is padding, after the sequence: the recurrences see zeros there, so that a reverse
    one comes to the last real step with the state zero (the official code of S5 lets it run over the padding), and
    the mean leaves it out.
    """
    key = rngs.dropout() if train else None
    x = layers.zero_padding(self.encoder(x), mask_BL)
    x = layers.run_blocks(self.blocks, x, key, self.drop_rates, remat=self.remat, train=train, mask_BL=mask_BL)
    if self.pool == "mean":
      return self.head(layers.masked_mean(x, mask_BL))
    if mask_BL is not None:
      x, _ = layers.align_right(x, mask_BL)
    return self.head(x[:, -1].astype(jnp.float32))
