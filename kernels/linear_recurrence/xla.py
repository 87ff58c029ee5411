"""The recurrence as a loop over time and as an associative scan, both with a backward pass written by hand.

The loop moves no axis: it reads step t of (B, T, N) where it lies and writes the state over it, so that XLA, which
otherwise copies x first, takes the memory of an x that nobody else needs (x is not kept for the gradient). On CPU, at
(50, 1024, 192), that takes two thirds of the time of a fresh output and a third of that of a scan with time moved to
the front. In the same way dx is written over the cotangent and da over a. The barriers are for the CPU too: they keep
the arithmetic apart from the copy into the large array, and an unrolled step from being computed again in the next.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Steps in one iteration of the loop: 4, 8 and 16 are equal on CPU and a tenth faster than 1; compilation is shortest.
_UNROLL = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sequential(
  x_re_BTN: jax.Array, x_im_BTN: jax.Array, a_re: jax.Array, a_im: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """States of all steps, one step after the other.

  Args:
    x_re_BTN, x_im_BTN: inputs, float32 or bfloat16.
    a_re, a_im: the diagonal in float32, (1, 1, N) if constant or (B, T, N).
    reverse: whether to run from the last step to the first.

  Returns:
    Real and imaginary part of the states, each (B, T, N) in x's dtype.
  """
  return _sequential_forward(x_re_BTN, x_im_BTN, a_re, a_im, reverse)[0]


def _sequential_forward(x_re_BTN, x_im_BTN, a_re, a_im, reverse):
  batch, steps, states = x_re_BTN.shape

  def step(carry, k):
    h, y = carry
    t = steps - 1 - k if reverse else k
    h = _multiply_add((_read(a_re, t), _read(a_im, t)), h, (_read(y[0], t), _read(y[1], t)))
    h = lax.optimization_barrier(h)
    return (h, (_write(y[0], h[0], t), _write(y[1], h[1], t))), None

  zero_BN = jnp.zeros((batch, states), jnp.float32)
  initial = ((zero_BN, zero_BN), (x_re_BTN, x_im_BTN))
  (_, h), _ = lax.scan(step, initial, jnp.arange(steps), unroll=_UNROLL)
  return h, (*h, a_re, a_im)


def _sequential_backward(reverse, residuals, cotangents):
  h_re_BTN, h_im_BTN, a_re, a_im = residuals
  batch, steps, states = h_re_BTN.shape
  constant = _constant(a_re)
  zero_BN = jnp.zeros((batch, states), jnp.float32)

  def step(carry, k):
    dx, a, y, da = carry  # a: the diagonal of the step handled just before, which dx_t needs
    t = k if reverse else steps - 1 - k
    dx = _multiply_add((a[0], -a[1]), dx, (_read(y[0], t), _read(y[1], t)))
    before = t + 1 if reverse else t - 1
    inside = (before >= 0) & (before < steps)
    before = jnp.clip(before, 0, steps - 1)
    h_re, h_im = (jnp.where(inside, _read(h, before), 0.0) for h in (h_re_BTN, h_im_BTN))
    if constant:
      da = _multiply_add((h_re, -h_im), dx, da)
      dx, da = lax.optimization_barrier((dx, da))
    else:
      a = _read(da[0], t), _read(da[1], t)
      da_t = _multiply_add((h_re, -h_im), dx, (zero_BN, zero_BN))
      dx, a, da_t = lax.optimization_barrier((dx, a, da_t))
      da = _write(da[0], da_t[0], t), _write(da[1], da_t[1], t)
    return (dx, a, (_write(y[0], dx[0], t), _write(y[1], dx[1], t)), da), None

  zero = zero_BN, zero_BN
  a, da = ((a_re[:, 0], a_im[:, 0]), zero) if constant else (zero, (a_re, a_im))
  initial = zero, a, cotangents, da
  (_, _, (dx_re_BTN, dx_im_BTN), da), _ = lax.scan(step, initial, jnp.arange(steps), unroll=_UNROLL)
  if constant:
    da = [part_BN.sum(0)[None, None] for part_BN in da]
  return dx_re_BTN, dx_im_BTN, *da


sequential.defvjp(_sequential_forward, _sequential_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def associative(
  x_re_BTN: jax.Array, x_im_BTN: jax.Array, a_re: jax.Array, a_im: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """States of all steps by a parallel scan (Blelloch 1990); arguments and result as in `sequential`."""
  return _associative_forward(x_re_BTN, x_im_BTN, a_re, a_im, reverse)[0]


def _associative_forward(x_re_BTN, x_im_BTN, a_re, a_im, reverse):
  h = _associative_scan((x_re_BTN, x_im_BTN), (a_re, a_im), reverse)
  h = tuple(part.astype(x_re_BTN.dtype) for part in h)
  return h, (*h, a_re, a_im)


def _associative_backward(reverse, residuals, cotangents):
  h_re_BTN, h_im_BTN, a_re, a_im = residuals
  constant = _constant(a_re)
  # a_{t+1}; what comes in at the end has no effect, as nothing is carried yet.
  a = (a_re, -a_im) if constant else (_shift(a_re, reverse), _shift(-a_im, reverse))
  dx = _associative_scan(cotangents, a, not reverse)
  h_re, h_im = (_shift(part, not reverse).astype(jnp.float32) for part in (h_re_BTN, h_im_BTN))
  da = h_re * dx[0] + h_im * dx[1], h_re * dx[1] - h_im * dx[0]
  if constant:
    da = tuple(part.sum((0, 1), keepdims=True) for part in da)
  return *(part.astype(h_re_BTN.dtype) for part in dx), *da


associative.defvjp(_associative_forward, _associative_backward)


def _associative_scan(x, a, reverse):
  """States in float32 of inputs x and a diagonal a, both pairs; a is (1, 1, N) or (B, T, N)."""
  steps = x[0].shape[1]
  # The powers of a constant diagonal are the same for all sequences: (1, T, N), not (B, T, N).
  a = [jnp.broadcast_to(part, (part.shape[0], steps, part.shape[2])) for part in a]

  def combine(first, second):
    a_first, x_first = first
    a_second, x_second = second
    a_re = a_first[0] * a_second[0] - a_first[1] * a_second[1]
    a_im = a_first[0] * a_second[1] + a_first[1] * a_second[0]
    return (a_re, a_im), _multiply_add(a_second, x_first, x_second)

  x = tuple(part.astype(jnp.float32) for part in x)
  return lax.associative_scan(combine, (tuple(a), x), reverse=reverse, axis=1)[1]


def _multiply_add(a, b, c):
  """a ⊙ b + c of complex numbers, each a pair of arrays."""
  return a[0] * b[0] - a[1] * b[1] + c[0], a[0] * b[1] + a[1] * b[0] + c[1]


def _constant(a):
  """Whether a is (1, 1, N), the same for all steps. So is that of a single step of a single sequence, rightly."""
  return a.shape[:2] == (1, 1)


def _shift(x_BTN, later):
  """x one step later in time (its last step falls off, zeros come in), or one step earlier."""
  zero = jnp.zeros_like(x_BTN[:, :1])
  parts = [zero, x_BTN[:, :-1]] if later else [x_BTN[:, 1:], zero]
  return jnp.concatenate(parts, axis=1)


def _read(x_BTN, t):
  """Step t in float32; the only one, (1, N), of a constant."""
  if _constant(x_BTN):
    return x_BTN[:, 0].astype(jnp.float32)
  return lax.dynamic_index_in_dim(x_BTN, t, 1, keepdims=False).astype(jnp.float32)


def _write(x_BTN, value_BN, t):
  """x with step t replaced."""
  return lax.dynamic_update_index_in_dim(x_BTN, value_BN.astype(x_BTN.dtype), t, 1)
