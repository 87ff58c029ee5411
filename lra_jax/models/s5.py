"""S5, simplified state space layers (Smith, Warrington & Linderman 2023, arXiv 2208.04933).

A diagonal linear system per layer, x' = Λ x + B u, y = Re(C x) + D u, held constant over steps of learned length Δ:
h_t = Λ̄ ⊙ h_{t−1} + B̄ u_t with Λ̄ = exp(ΛΔ), B̄ = Λ⁻¹ (Λ̄ − 1) B (equation 6). Of the states, which come in conjugate
pairs, one each is kept, and y = 2 Re(C h) + D u.

Initialisation is that of the official code (lindermanlab/S5): Λ and the eigenvectors V of the normal part of
HiPPO-LegS, in `ssm_blocks` equal blocks; B = V⁻¹ of a real matrix from N(0, 1/P'), C = (complex matrix) V, log Δ
uniform between log 0.001 and log 0.1, D from N(0, 1). The matrix C is drawn in half of the published LRA runs from a
far narrower distribution than LeCun's (flax takes the leading axis for a receptive field); that is kept, and the other
two are there (`C_INITS`).

Axes: B batch, L steps, D width, P states kept, P' = 2P all states.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels.linear_recurrence
from lra_jax import errors
from lra_jax.models import linear_rnn

STEP_MAX = 1e-1  # of Δ, "dt_max"
# Real and imaginary part of what V is multiplied with: truncated normal, of variance 1 / (D P') or 1 / P'; or C itself
# from N(0, 1/2).
C_INITS = ("lecun_normal", "trunc_standard_normal", "complex_normal")
LARGEST_REAL_PART = -1e-4  # of Λ where it is clipped

S5_MODELS = {
  # bin/run_experiments/run_lra_cifar.sh
  "s5": dict(width=512, depth=6, states=384, ssm_blocks=3, bidirectional=True, clip_eigenvalues=True, dropout=0.1),
  # Ours.
  "s5_digits": dict(width=64, depth=3, states=64, ssm_blocks=1, bidirectional=True, clip_eigenvalues=True),
}


class Ssm(nnx.Module):
  """The state space layer of one block: (B, L, D) → (B, L, D)."""

  def __init__(
    self, width, states, blocks, *, bidirectional, clip_eigenvalues, c_init, step_min, implementation, dtype, rngs
  ):
    errors.check_known("config.model.c_init:", c_init, C_INITS)
    if states % (2 * blocks):
      raise errors.UserError(f"config.model.states={states} must be a multiple of 2 × ssm_blocks={blocks}")
    self.bidirectional, self.clip, self.implementation = bidirectional, clip_eigenvalues, implementation
    self.dtype = dtype
    eigenvalues, vectors = hippo_legs(states // blocks)
    kept = states // 2
    self.lambda_re = nnx.Param(jnp.asarray(np.tile(eigenvalues.real, blocks), jnp.float32))
    self.lambda_im = nnx.Param(jnp.asarray(np.tile(eigenvalues.imag, blocks), jnp.float32))
    low, high = np.log((step_min, STEP_MAX))
    self.log_step = nnx.Param(jax.random.uniform(rngs.params(), (kept,), jnp.float32, low, high))
    vectors = np.kron(np.eye(blocks), vectors)  # (P', P)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    v_re, v_im = vectors.real.astype(np.float32), vectors.imag.astype(np.float32)
    b = jax.random.normal(rngs.params(), (states, width)) * states**-0.5
    self.w_b_re, self.w_b_im = nnx.Param(product(v_re.T, b)), nnx.Param(product(-v_im.T, b))
    c_re, c_im = [], []
    for _ in range(1 + bidirectional):
      if c_init == "complex_normal":
        draw = 0.5**0.5 * jax.random.normal(rngs.params(), (2, width, kept), jnp.float32)
        c_re.append(draw[0])
        c_im.append(draw[1])
        continue
      # flax's lecun_normal of shape (D, P', 2): a truncated normal of variance 1 / (D P').
      draw = jax.nn.initializers.lecun_normal()(rngs.params(), (width, states, 2), jnp.float32)
      if c_init == "trunc_standard_normal":
        draw = draw * width**0.5
      c_re.append(product(draw[..., 0], v_re) - product(draw[..., 1], v_im))
      c_im.append(product(draw[..., 0], v_im) + product(draw[..., 1], v_re))
    # (D, P) or (D, 2P): first of the states that run forward, then of those that run backward.
    self.w_c_re, self.w_c_im = nnx.Param(jnp.concatenate(c_re, axis=1)), nnx.Param(jnp.concatenate(c_im, axis=1))
    self.d = nnx.Param(jax.random.normal(rngs.params(), (width,), jnp.float32))

  def discretized(self) -> tuple[jax.Array, jax.Array]:
    """Λ̄ (P,) and B̄ (P, D), complex64, by zero-order hold."""
    real = self.lambda_re[...]
    if self.clip:
      real = jnp.minimum(real, LARGEST_REAL_PART)
    eigenvalues = jax.lax.complex(real, self.lambda_im[...])
    discrete = jnp.exp(eigenvalues * jnp.exp(self.log_step[...]))
    b = jax.lax.complex(self.w_b_re[...], self.w_b_im[...])
    return discrete, ((discrete - 1) / eigenvalues).reshape(-1, 1) * b

  def __call__(self, u_BLD: jax.Array) -> jax.Array:
    a, b = self.discretized()
    project = jnp.concatenate([b.real.T, b.imag.T], axis=1).astype(self.dtype)
    x_re, x_im = jnp.split(u_BLD @ project, 2, axis=-1)
    states = []
    for reverse in (False, True)[: 1 + self.bidirectional]:
      scan = kernels.linear_recurrence.linear_recurrence
      states.append(scan(x_re, x_im, a.real, a.imag, reverse=reverse, implementation=self.implementation))
    parts = [part for parts in zip(*states, strict=True) for part in parts]  # all real parts, then all imaginary ones
    read = 2 * jnp.concatenate([self.w_c_re[...], -self.w_c_im[...]], axis=1).T.astype(self.dtype)
    return jnp.concatenate(parts, axis=-1) @ read + self.d[...].astype(u_BLD.dtype).reshape(1, 1, -1) * u_BLD


class S5(linear_rnn.Stack):
  """Encoder, S5 layers, mean over time, Dense."""

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    width: int,
    depth: int,
    states: int,
    ssm_blocks: int,
    bidirectional: bool = False,
    clip_eigenvalues: bool = False,
    c_init: str = "lecun_normal",
    step_min: float = 1e-3,
    patch_size: int = 1,
    norm: str = "batch",
    norm_momentum: float = 0.95,
    prenorm: bool = True,
    activation: str = "half_glu1",
    pool: str = "mean",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: bool = False,
    implementation: str | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: of one example; an image is read patch by patch in raster order.
      num_classes: width of the head.
      vocab_size: number of different integer tokens.
      width: D.
      depth: number of layers.
      states: P', counting both of every conjugate pair ("ssm_size").
      ssm_blocks: equal blocks that the states are initialised in.
      bidirectional: whether a second set of states runs from the end to the start.
      clip_eigenvalues: whether the real parts of Λ are kept below −10⁻⁴.
      c_init: what C is drawn from, one of `C_INITS` ("C_init").
      step_min: smallest Δ at the start ("dt_min").
      patch_size: pixels; 1 for sequences and tokens.
      norm: "batch" or "layer".
      norm_momentum: of BatchNorm's running statistics.
      prenorm: whether the norm comes first in a layer, or last, after the skip.
      activation: "half_glu1", "half_glu2", "full_glu" or "gelu"; see the appendix G.1 of the paper.
      pool: "mean" over time, or "last" step.
      dropout: rate of channels, the same ones at all steps.
      drop_path: rate of stochastic depth of the last layer, linear from 0 at the first (not in the paper).
      remat: recompute every layer in the backward pass instead of keeping its activations.
      implementation: of the recurrence, see `kernels.linear_recurrence`.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: values that do not fit each other or the input.
    """
    super().__init__(
      lambda: Ssm(
        width,
        states,
        ssm_blocks,
        bidirectional=bidirectional,
        clip_eigenvalues=clip_eigenvalues,
        c_init=c_init,
        step_min=step_min,
        implementation=implementation,
        dtype=jnp.dtype(dtype),
        rngs=rngs,
      ),
      input_shape=input_shape,
      num_classes=num_classes,
      vocab_size=vocab_size,
      width=width,
      depth=depth,
      patch_size=patch_size,
      norm=norm,
      norm_momentum=norm_momentum,
      prenorm=prenorm,
      activation=activation,
      pool=pool,
      dropout=dropout,
      drop_path=drop_path,
      remat=remat,
      dtype=jnp.dtype(dtype),
      rngs=rngs,
    )


@functools.lru_cache(maxsize=8)  # every layer starts from the same
def hippo_legs(states: int) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues and eigenvectors of the normal part of the HiPPO-LegS matrix (Gu et al. 2020; S5, section 4.2).

  With q_n = √(n + ½), the normal part is S − ½ I, where S_nk = −q_n q_k below the diagonal and its negative above.

  Args:
    states: N, even.

  Returns:
    The half of the eigenvalues whose imaginary part is negative, (N / 2,) complex128 in ascending order of it
    reversed, as −½ + i Im, and their orthonormal eigenvectors, the columns of (N, N / 2) complex128.
  """
  q = np.sqrt(np.arange(states) + 0.5)
  product = q.reshape(-1, 1) * q
  skew = np.triu(product, 1) - np.tril(product, -1)
  imaginary, vectors = np.linalg.eigh(-1j * skew)  # S is skew-symmetric, so −iS is Hermitian
  return -0.5 + 1j * imaginary[: states // 2], vectors[:, : states // 2]
