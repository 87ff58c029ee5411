"""TrellisNet (Bai, Kolter & Koltun 2019, arXiv 1810.06682), as in the pixel experiments of locuslab/trellisnet.

All levels share one causal convolution, and each gets the input anew. With H = hidden + outputs channels, d the level's
dilation, x the input, and h = c = 0 before the first step and at level 0:

  (i, o, g, f) = W₁ ∗_d x + W₂ ∗_d drop(h) + b,   i, o, f by σ, g by tanh
  c'_t = f ⊙ c_{t−d} + i ⊙ g,   h'_t = o ⊙ tanh(c'_t)

There is no recurrence in time. The class is read from the last `outputs` channels of the last step of the last level,
so only what that step depends on is computed: with doubling dilations every second step of the level before, a fifth
of all.

Axes: B batch, L steps, C input channels, H channels of the state, R taps of the convolution.
The official code drops inputs and outputs at test time too (`F.dropout` without `training`); here nothing is dropped
then.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lra_jax import errors
from lra_jax.models import layers

INIT_STD = 0.01  # of all weights and the bias; trellisnet.py, `init_weights`

# seq_mnist_cifar.py: 11 levels, receptive field 1025. Dropout rates are those of its defaults.
TRELLISNET = {
  "trellisnet": dict(
    hidden=120,
    dilations=(1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    dropout_input=0.2,
    dropout_hidden=0.2,
    dropout_output=0.1,
    dropout_weight=0.1,
  ),
  # Ours, for 64 steps.
  "trellisnet_digits": dict(hidden=120, dilations=(1, 1, 2, 4, 8, 16, 32)),
}


class TrellisNet(nnx.Module):
  """The class of a sequence from the last step of the last level."""

  INPUTS = ("image", "sequence", "tokens")
  READS_SHORTER = True

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    hidden: int,
    dilations: tuple[int, ...],
    outputs: int = 10,
    kernel_size: int = 2,
    embed_features: int = 16,
    weight_norm: bool = True,
    dropout_input: float = 0.0,
    dropout_hidden: float = 0.0,
    dropout_output: float = 0.0,
    dropout_weight: float = 0.0,
    remat: bool = False,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: of one example; an image is read pixel by pixel in raster order.
      num_classes: width of the head.
      vocab_size: number of different integer tokens.
      hidden: channels of the state besides the outputs ("nhid").
      dilations: one a level, from the input up.
      outputs: the last channels of the state, which the head reads ("nout").
      kernel_size: R, taps of the convolution.
      embed_features: width of the embedding of integer tokens.
      weight_norm: whether every output channel's weights have a direction and a length (Salimans & Kingma 2016).
      dropout_input: rate of the input's elements.
      dropout_hidden: rate of the channels of h, the same ones at all steps and levels (Gal & Ghahramani 2016).
      dropout_output: rate of what the head reads.
      dropout_weight: rate of single weights of the past taps (Merity et al. 2018), the same ones at all levels.
      remat: recompute every level in the backward pass instead of keeping its activations.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: no levels, or dilations or taps below 1.
    """
    if not dilations or min(dilations) < 1 or kernel_size < 1:
      raise errors.UserError(
        f"config.model: dilations={tuple(dilations)}, kernel_size={kernel_size}; one dilation of at least 1 a level"
      )
    self.dtype, self.remat = jnp.dtype(dtype), remat
    self.dilations, self.outputs = tuple(dilations), outputs
    self.rates = (dropout_input, dropout_hidden, dropout_output, dropout_weight)
    self.embed = nnx.data(None)
    channels = input_shape[-1]
    if len(input_shape) == 1:
      channels = embed_features
      init = nnx.initializers.normal(0.1)
      self.embed = nnx.Embed(vocab_size, channels, embedding_init=init, dtype=self.dtype, rngs=rngs)
    self.width = hidden + outputs
    draw = nnx.initializers.normal(INIT_STD)
    self.w_input = nnx.Param(draw(rngs.params(), (kernel_size, channels, 4 * self.width), jnp.float32))
    self.w_hidden = nnx.Param(draw(rngs.params(), (kernel_size, self.width, 4 * self.width), jnp.float32))
    self.bias = nnx.Param(draw(rngs.params(), (4 * self.width,), jnp.float32))
    self.g_input, self.g_hidden = nnx.data(None), nnx.data(None)
    if weight_norm:
      self.g_input = nnx.Param(jnp.linalg.norm(self.w_input[...], axis=(0, 1)))
      self.g_hidden = nnx.Param(jnp.linalg.norm(self.w_hidden[...], axis=(0, 1)))
    self.head = layers.torch_linear(outputs, num_classes, dtype=jnp.float32, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """(B, *input_shape) → float32 logits (B, S); `rngs` (stream `dropout`) is needed where `train` is true.

    `mask_BL` is False where a step is padding, after the sequence; the result is that of the sequence alone.
    """
    keys = layers.split(rngs.dropout() if train else None, 2)
    length = x.shape[1] * (x.shape[2] if x.ndim == 4 else 1)
    if mask_BL is not None:
      x, mask_BL = layers.align_right(x, mask_BL)
    last = self.states(x, np.array([length - 1]), keys[0], mask_BL)[:, 0, -self.outputs :]
    return self.head(layers.dropout(last, self.rates[2], keys[1]).astype(jnp.float32))

  def states(
    self, x: jax.Array, steps: np.ndarray, key: jax.Array | None = None, mask_BL: jax.Array | None = None
  ) -> jax.Array:
    """h of the last level at some steps.

    Args:
      x: (B, *input_shape).
      steps: ascending, from 0.
      key: of all dropout; None for none.
      mask_BL: False where a step is padding, before the sequence: h and c are 0 there.

    Returns:
      (B, len(steps), H).
    """
    keys = layers.split(key, 4)
    if self.embed is not None:
      x = self.embed(x)
    x_BLC = layers.dropout(x.reshape(len(x), -1, x.shape[-1]).astype(self.dtype), self.rates[0], keys[0])
    x_BLC = layers.zero_padding(x_BLC, mask_BL)
    w_input = self._weights(self.w_input, self.g_input, keys[1])
    w_hidden = self._weights(self.w_hidden, self.g_hidden, keys[2])
    ones = jnp.ones((len(x), 1, self.width), self.dtype)
    mask = layers.dropout(ones, self.rates[1], keys[3]) if keys[3] is not None else None

    # From the top down: the steps of every level that a step above depends on, and the input that they need.
    taps = len(w_input)
    wanted = [np.asarray(steps)]
    for dilation in self.dilations[::-1]:
      reached = wanted[0].reshape(-1, 1) - dilation * np.arange(max(taps, 2))  # c is read one dilation back, always
      wanted.insert(0, np.unique(reached[reached >= 0]))
    everywhere = np.arange(x_BLC.shape[1])
    injected = {}
    for dilation in set(self.dilations):
      all_levels = [out for d, out in zip(self.dilations, wanted[1:], strict=True) if d == dilation]
      out = np.unique(np.concatenate(all_levels))
      injected[dilation] = (
        out,
        _gather_taps(x_BLC, everywhere, out, dilation, taps) @ w_input.reshape(-1, 4 * self.width),
      )

    def level(h, c, injected, w_hidden, mask, have, out, dilation):
      past = _gather_taps(h if mask is None else h * mask, have, out, dilation, taps)
      a = injected + past @ w_hidden.reshape(-1, 4 * self.width) + self.bias[...].astype(self.dtype).reshape(1, 1, -1)
      i, o, g, f = jnp.split(a, 4, axis=-1)
      c = jax.nn.sigmoid(f) * _at(c, have, out - dilation) + jax.nn.sigmoid(i) * jnp.tanh(g)
      return jax.nn.sigmoid(o) * jnp.tanh(c), c

    h = c = jnp.zeros((len(x), len(wanted[0]), self.width), self.dtype)
    for dilation, have, out in zip(self.dilations, wanted[:-1], wanted[1:], strict=True):
      where, z = injected[dilation]
      run = lambda h, c, z, w, mask, sizes=(have, out, dilation): level(h, c, z, w, mask, *sizes)
      h, c = (jax.checkpoint(run) if self.remat else run)(h, c, _at(z, where, out), w_hidden, mask)
      if mask_BL is not None:
        h, c = (layers.zero_padding(state, mask_BL[:, out]) for state in (h, c))
    return h

  def _weights(self, w_RIF, g_F, key):
    """Weight dropout of the past taps (the direction's, as in the official code), then weight norm."""
    w = w_RIF[...]
    w = jnp.concatenate([layers.dropout(w[:-1], self.rates[3], key), w[-1:]])
    if g_F is not None:
      w = w * (g_F[...] * jax.lax.rsqrt((w**2).sum((0, 1)))).reshape(1, 1, -1)
    return w.astype(self.dtype)


def _gather_taps(x_BLC, have, out, dilation, taps):
  """Steps t − (R − 1 − r)·dilation of every t of `out`, tap after tap: (B, len(out), R·C); zeros before the start."""
  return jnp.concatenate([_at(x_BLC, have, out - dilation * (taps - 1 - r)) for r in range(taps)], axis=-1)


def _at(x_BLC, have, steps):
  """x at some steps, of an x that has the steps `have` (ascending); zeros for steps below 0.

  Regular steps become a slice with a stride, whose gradient is cheap; others a gather.
  """
  before = int((steps < 0).sum())
  places = np.searchsorted(have, steps[before:])
  if not len(places):
    return jnp.zeros((len(x_BLC), before, x_BLC.shape[-1]), x_BLC.dtype)
  strides = np.unique(np.diff(places))
  if len(strides) <= 1:
    stride = int(strides[0]) if len(strides) else 1
    x_BLC = x_BLC[:, int(places[0]) : int(places[-1]) + 1 : stride]
  else:
    x_BLC = jnp.take(x_BLC, places, axis=1)
  return jnp.pad(x_BLC, ((0, 0), (before, 0), (0, 0)))
