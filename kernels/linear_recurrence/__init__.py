"""Linear recurrence with a complex diagonal: the state of S5, LRU and their kind, over time.

Axes: B batch, T time steps, N states. With h_0 = 0 (Smith et al. 2023, "Simplified State Space Layers for Sequence
Modeling", eq. 2 with B̄u as x; Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", eq. 2):

  h_t = a_t ⊙ h_{t−1} + x_t,   t = 1 … T

Complex numbers are pairs of real arrays throughout: that is what GPU kernels take, and XLA's CPU backend multiplies
complex numbers an element at a time. With g the cotangent of h (a pair too: ∂/∂re + i ∂/∂im), the gradient is the same
recurrence in the other direction:

  dx_t = conj(a_{t+1}) ⊙ dx_{t+1} + g_t,   da_t = conj(h_{t−1}) ⊙ dx_t   (summed over B and T where a is constant)

so that nothing but a and the result h is kept for it. Carries are float32 whatever x's dtype.

"mosaic" is a Pallas kernel for Hopper GPUs that crosses device memory once: x is read, h written. Its blocks keep the
state in registers and find the states between parts of a chunk of time in shared memory. Backward is the same kernel.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.linear_recurrence import reference, xla


def _mosaic(*arguments):
  from kernels.linear_recurrence import mosaic

  return mosaic.recurrence(*arguments)


IMPLEMENTATIONS = {
  "reference": reference.recurrence,
  "sequential": xla.sequential,
  "associative": xla.associative,
  "mosaic": _mosaic,
}


def linear_recurrence(
  x_re_BTN: jax.Array,
  x_im_BTN: jax.Array,
  a_re: jax.Array,
  a_im: jax.Array,
  *,
  reverse: bool = False,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """All states of h_t = a_t ⊙ h_{t−1} + x_t.

  Args:
    x_re_BTN, x_im_BTN: real and imaginary part of the inputs, both float32 or both bfloat16.
    a_re, a_im: the diagonal, (N,) if constant or (B, T, N), one for every step; computed with in float32.
    reverse: whether to run from the last step to the first (h_t = a_t ⊙ h_{t+1} + x_t).
    implementation: "reference", "sequential" (a loop over time), "associative" (a parallel scan, ⌈log₂ T⌉ levels),
      "mosaic" (Hopper GPUs; float32 arithmetic, |a| up to 2.5) or None: "sequential" on CPU, elsewhere "mosaic" if it
      can serve, else "associative".

  Returns:
    Real and imaginary part of the states, each (B, T, N) in x's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit, an unknown implementation, or one that cannot serve.
  """
  _check(x_re_BTN, x_im_BTN, a_re, a_im)

  def refuse():
    from kernels.linear_recurrence import mosaic

    return mosaic.refuse(x_re_BTN)

  default = "sequential" if dispatch.platform() == "cpu" else "associative"
  run = dispatch.choose("linear_recurrence", IMPLEMENTATIONS, implementation, default, refuse)
  varying = a_re.ndim == 3
  # (1, 1, N) and (B, T, N) are read alike.
  a_re, a_im = (a.astype(jnp.float32).reshape((1,) * (3 - a.ndim) + a.shape) for a in (a_re, a_im))
  per_device = dispatch.per_device(lambda *arrays: run(*arrays, bool(reverse)), (True, True, varying, varying))
  return per_device(x_re_BTN, x_im_BTN, a_re, a_im)


def _check(x_re_BTN, x_im_BTN, a_re, a_im):
  shape, dtype = x_re_BTN.shape, x_re_BTN.dtype
  if len(shape) != 3:
    raise ValueError(f"linear_recurrence: x_re has shape {shape}, expected 3 axes")
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"linear_recurrence: x_re is {dtype}, expected float32 or bfloat16")
  if x_im_BTN.shape != shape or x_im_BTN.dtype != dtype:
    raise ValueError(
      f"linear_recurrence: x_im is {x_im_BTN.dtype} of shape {x_im_BTN.shape}, but x_re {dtype} of shape {shape}"
    )
  for name, a in (("a_re", a_re), ("a_im", a_im)):
    if a.shape != a_re.shape or a.shape not in (shape[-1:], shape):
      raise ValueError(
        f"linear_recurrence: {name} has shape {a.shape}, expected {shape[-1:]} or {shape} for both parts"
      )
