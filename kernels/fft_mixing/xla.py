"""Three forms that use that x is real, each its own gradient.

`half` leaves the transform to XLA. The spectrum of a real x is symmetric, F[−k, −d] = conj F[k, d], so the columns
0 … D/2 determine the rest: Re F[k, D − d] = Re F[−k, d]. Half of the work.

`quarter` leaves less of it. The real part sees only the half of x that is symmetric, (x[n, d] + x[−n, −d]) / 2, and
for a symmetric x the transform along L of column d is the conjugate of that of column −d. So real transforms of the
columns 0 … D/2 and back to D real numbers for the rows 0 … L/2 are all; the other rows are y[−k, d] = y[k, −d].

`folded` has no complex numbers. C is even and S odd in both indices, so C_L x C_D sees only the part of x that is even
along both axes and S_L x S_D only the part odd along both, and a quarter of each result determines the rest. One eighth
of the products of the direct form, in either order of the two products of each. On CPU it loses against both unless D
has a large prime factor: the products grow with L + D, the transform with log(L·D).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def self_adjoint(form: Callable) -> Callable:
  """`form`, a symmetric linear operator, with itself as gradient."""
  mixing = jax.custom_vjp(form)
  mixing.defvjp(lambda x_BLD: (mixing(x_BLD), None), lambda _, dy_BLD: (mixing(dy_BLD),))
  return mixing


@self_adjoint
def half(x_BLD: jax.Array) -> jax.Array:
  """Re(FFT over L and D) of float32 or bfloat16, computed in float32; the result in x's dtype."""
  width = x_BLD.shape[2]
  y_BLE = jnp.fft.rfft2(x_BLD.astype(jnp.float32)).real
  # On CPU the reversed reads below are faster from real numbers than from every other of the complex ones.
  y_BLE = lax.optimization_barrier(y_BLE.astype(x_BLD.dtype))
  around_BLE = jnp.concatenate([y_BLE[:, 1:], y_BLE[:, :1]], axis=1)  # rows 1 … L, of which L is 0; reversed −0, −1 …
  rest_BLE = lax.rev(around_BLE[:, :, 1 : (width + 1) // 2], (1, 2))
  return jnp.concatenate([y_BLE, rest_BLE], axis=2)


@self_adjoint
def quarter(x_BLD: jax.Array) -> jax.Array:
  """Re(FFT over L and D) of float32 or bfloat16, computed in float32; the result in x's dtype."""
  _, length, width = x_BLD.shape
  x_BLE = lax.optimization_barrier(_symmetric_half(x_BLD.astype(jnp.float32)))
  spectrum_BKE = jnp.fft.rfft(x_BLE, axis=1)
  y_BKD = jnp.fft.irfft(
    spectrum_BKE.conj(), n=width, axis=2, norm="forward"
  )  # conj: the inverse's exponent is positive
  y_BKD = lax.optimization_barrier(y_BKD.astype(x_BLD.dtype))
  rest_BKD = lax.rev(y_BKD[:, 1 : (length + 1) // 2], (1, 2))
  rest_BKD = jnp.concatenate([rest_BKD[:, :, -1:], rest_BKD[:, :, :-1]], axis=2)  # columns D − 0, which is 0, D − 1 …
  return jnp.concatenate([y_BKD, rest_BKD], axis=1)


def _symmetric_half(x_BLD):
  """(x[n, d] + x[−n, −d]) / 2 for 0 ≤ d ≤ D/2."""
  _, _, width = x_BLD.shape
  around = lambda x_BLE: jnp.concatenate([x_BLE[:, -1:], x_BLE[:, :-1]], axis=1)  # rows −0, −1 … of reversed ones
  first = x_BLD[:, :, :1] + around(lax.rev(x_BLD[:, :, :1], (1,)))
  others = x_BLD[:, :, 1 : width // 2 + 1] + around(lax.rev(x_BLD[:, :, width - width // 2 :], (1, 2)))
  return jnp.concatenate([first, others], axis=2) / 2


@self_adjoint
def folded(x_BLD: jax.Array) -> jax.Array:
  """Re(FFT over L and D); a bfloat16 x has bfloat16 products with float32 sums. The result is in x's dtype."""
  _, length, width = x_BLD.shape
  p, q = fold(x_BLD.astype(jnp.float32))
  (cos_L, sin_L), (cos_D, sin_D) = _matrices(length), _matrices(width)
  p = _product("kl,ble->bke", cos_L, _product("bld,de->ble", p, cos_D, x_BLD.dtype), x_BLD.dtype)
  q = _product("kl,ble->bke", sin_L, _product("bld,de->ble", q, sin_D, x_BLD.dtype), x_BLD.dtype)
  # p has the frequencies 0 … n/2 of each axis; q lacks 0 and, where n is even, n/2: sines are 0 there.
  q = jnp.pad(q, [(0, 0)] + [(1, p.shape[axis] - 1 - q.shape[axis]) for axis in (1, 2)])
  difference, total = p - q, p + q
  top = _mirror(difference, total, width, 2)
  bottom = _mirror(total, difference, width, 2)
  return _mirror(top, bottom, length, 1).astype(x_BLD.dtype)


@functools.lru_cache(maxsize=64)
def _matrices(length: int) -> tuple[np.ndarray, np.ndarray]:
  """Quarter of the cosine matrix (frequencies 0 … n/2) and of the sine matrix (those between 0 and n/2), float32."""
  k = np.arange(length // 2 + 1)
  angles = 2 * np.pi / length * (np.outer(k, k) % length)  # the remainder keeps the angles small and so exact
  inner = slice(1, (length + 1) // 2)
  return np.cos(angles).astype(np.float32), np.sin(angles[inner, inner]).astype(np.float32)


def _product(equation, x, y, dtype):
  """A product with operands in `dtype` and a float32 sum; float32 operands without the shortcuts of tensor cores."""
  x, y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
  return jnp.einsum(equation, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def fold(x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The part of x that is even along L and D, (B, ⌊L/2⌋ + 1, ⌊D/2⌋ + 1), and the odd one without its zeros."""
  even, odd = _fold(x_BLD, 1)
  return _fold(even, 2)[0], _fold(odd, 2)[1]


def _fold(x, axis):
  """Sums x[j] + x[n−j] for 0 ≤ j ≤ n/2, an entry that is its own mirror taken once; differences for 0 < j < n/2."""
  length = x.shape[axis]
  pairs = (length - 1) // 2
  first = lax.slice_in_dim(x, 1, pairs + 1, axis=axis)
  second = lax.rev(lax.slice_in_dim(x, length - pairs, length, axis=axis), (axis,))
  zero = lax.slice_in_dim(x, 0, 1, axis=axis)
  middle = lax.slice_in_dim(x, pairs + 1, length // 2 + 1, axis=axis)
  return jnp.concatenate([zero, first + second, middle], axis), first - second


def _mirror(first, second, length, axis):
  """Entries 0 … n/2 from `first`, entry n − k from entry k of `second`."""
  rest = lax.rev(lax.slice_in_dim(second, 1, (length + 1) // 2, axis=axis), (axis,))
  return jnp.concatenate([first, rest], axis)
