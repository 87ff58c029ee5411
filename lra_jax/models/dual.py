"""Two sequences, one encoder: the Retrieval task of the Long Range Arena (Tay et al. 2021, section 2.2.3).

The encoder's features of both, x₁ and x₂ (what its head would read), become one vector

  (x₁, x₂, x₁ ⊙ x₂, x₁ − x₂)

for a head with one hidden layer, as in the official code of Nyströmformer, S4 and S5, and in the "NLI" interaction of
google-research/long-range-arena. Its hidden layer is as wide as that of the encoder's own head, as in Nyströmformer's,
or else as the features, as in S5's. (The benchmark's published runs feed x₁ and x₂ alone to two hidden layers, with
nearly the same number of parameters.) There is no attention between the two: each must be summed up alone.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lra_jax.models import layers


class _Features(nnx.Module):
  """Stands where the encoder's classification layer was."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x


class DualEncoder(nnx.Module):
  """Logits of a pair of sequences."""

  def __init__(self, encoder: nnx.Module, num_classes: int, *, rngs: nnx.Rngs):
    """Args: encoder, any model of token sequences, whose head is taken away; S; stream `params`."""
    own = getattr(encoder, "head_hidden", None)
    width = hidden = encoder.head.in_features
    if own is not None:
      width, encoder.head_hidden = own.in_features, nnx.data(None)
    encoder.head = _Features()
    self.encoder = encoder
    self.hidden = layers.linear(4 * width, hidden, kernel_init=layers.lecun_normal, dtype=jnp.float32, rngs=rngs)
    self.head = nnx.Linear(hidden, num_classes, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """(B, 2, L) int32 → float32 logits (B, S). `mask_BL`, here (B, 2, L), is False where a token is padding."""
    batch, _, length = x.shape
    mask = None if mask_BL is None else mask_BL.reshape(2 * batch, length)
    features = self.encoder(x.reshape(2 * batch, length), mask_BL=mask, train=train, rngs=rngs).astype(jnp.float32)
    first, second = jnp.unstack(features.reshape(batch, 2, -1), axis=1)
    both = jnp.concatenate([first, second, first * second, first - second], axis=-1)
    return self.head(jax.nn.relu(self.hidden(both)))
