"""kernels.lipschitz_rnn against NumPy in float64, written from the equations, and its finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.lipschitz_rnn
from kernels import dispatch

FORMS = [("euler", False), ("euler", True), ("midpoint", False), ("rk4", False)]
FORM_NAMES = ["euler", "gated", "midpoint", "rk4"]
EPSILON = 0.2


def draw(seed, batch, steps, width, gated):
  """z, A, W and, if wanted, a gate, float64."""
  rng = np.random.RandomState(seed)
  matrices = [rng.randn(width, width) / width**0.5 - 0.3 * np.eye(width) for _ in range(2)]
  inputs = [rng.randn(batch, steps, width) for _ in range(1 + gated)]
  return [inputs[0], *matrices, *inputs[1:]]


def numpy_lipschitz_rnn(z, a, w, gate=None, method="euler", epsilon=EPSILON):
  """The equations, one step at a time, in float64: (B, T, D)."""
  h, states = np.zeros((len(z), z.shape[2])), []
  for t in range(z.shape[1]):

    def f(h, t=t):
      velocity = h @ a + np.tanh(h @ w + z[:, t])
      return velocity if gate is None else velocity / (1 + np.exp(-(h @ w + gate[:, t])))

    k1 = f(h)
    if method == "euler":
      h = h + epsilon * k1
    elif method == "midpoint":
      h = h + epsilon * f(h + epsilon * k1 / 2)
    else:  # Kutta 1901: nodes 0, 1/3, 2/3, 1 and weights 1/8, 3/8, 3/8, 1/8
      k2 = f(h + epsilon * k1 / 3)
      k3 = f(h + epsilon * (-k1 / 3 + k2))
      k4 = f(h + epsilon * (k1 - k2 + k3))
      h = h + epsilon * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    states.append(h)
  return np.stack(states, 1)


def ours(z, a, w, gate=None, **keywords):
  return kernels.lipschitz_rnn.lipschitz_rnn(z, a, w, gate_BTD=gate, epsilon=EPSILON, **keywords)


def relative_error(x, truth):
  return np.linalg.norm(np.asarray(x, np.float64) - truth) / np.linalg.norm(truth)


def float32(arrays):
  return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("method,gated", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("batch,steps,width", [(3, 7, 5), (1, 1, 2), (2, 33, 12)])
def test_equals_numpy(implementation, method, gated, batch, steps, width):
  arrays = draw(0, batch, steps, width, gated)
  truth = numpy_lipschitz_rnn(*arrays, method=method)
  states = ours(*float32(arrays), method=method, implementation=implementation)
  assert states.shape == truth.shape and states.dtype == jnp.float32
  assert relative_error(states, truth) < 1e-6
  last = ours(*float32(arrays), method=method, implementation=implementation, last=True)
  assert last.shape == (batch, width) and relative_error(last, truth[:, -1]) < 1e-6


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("method,gated", FORMS, ids=FORM_NAMES)
def test_gradient_equals_finite_differences(implementation, last, method, gated):
  """The directional derivative along random directions, by central differences of the float64 NumPy forward."""
  rng = np.random.RandomState(1)
  arrays = draw(2, 2, 9, 6, gated)
  weight = rng.randn(2, 9, 6) * ([[[0]] * 8 + [[1]]] if last else 1)

  def loss(*arrays):
    states = ours(*arrays, method=method, implementation=implementation, last=last, unroll=2)
    return (states * weight[:, -1].astype(np.float32) if last else states * weight.astype(np.float32)).sum()

  gradients = jax.grad(loss, argnums=tuple(range(len(arrays))))(*float32(arrays))
  for index, gradient in enumerate(gradients):
    direction = rng.randn(*arrays[index].shape)
    shifted = [[a + sign * 1e-6 * direction if k == index else a for k, a in enumerate(arrays)] for sign in (1, -1)]
    above, below = ((numpy_lipschitz_rnn(*shift, method=method) * weight).sum() for shift in shifted)
    truth = (above - below) / 2e-6
    assert gradient.dtype == jnp.float32
    scale = np.linalg.norm(np.asarray(gradient)) * np.linalg.norm(direction)
    assert abs((np.asarray(gradient, np.float64) * direction).sum() - truth) < 3e-7 * scale


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("method,gated", FORMS, ids=FORM_NAMES)
def test_xla_equals_reference_with_gradients(last, method, gated):
  arrays = float32(draw(3, 4, 40, 16, gated))

  def loss(implementation, *arrays):
    return (ours(*arrays, method=method, implementation=implementation, last=last) ** 2).sum()

  every = tuple(range(1, 1 + len(arrays)))
  gradients = jax.jit(jax.grad(loss, argnums=every), static_argnums=0)("xla", *arrays)
  truth = jax.grad(loss, argnums=every)("reference", *arrays)
  for a, b in zip(gradients, truth, strict=True):
    assert relative_error(a, np.asarray(b, np.float64)) < 2e-6


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("method,gated", FORMS, ids=FORM_NAMES)
def test_bfloat16(last, method, gated):
  """Inputs and products are rounded, the state is not; gradients of the matrices have their dtype."""
  arrays = draw(4, 3, 50, 16, gated)
  arrays = [a if a.ndim == 2 else np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays]

  def loss(dtype, implementation, *arrays):
    arrays = [a if a.ndim == 2 else a.astype(dtype) for a in arrays]
    states = ours(*arrays, method=method, implementation=implementation, last=last)
    assert states.dtype == (jnp.float32 if last else dtype)
    return (states.astype(jnp.float32) ** 2).sum(), states

  every = tuple(range(2, 2 + len(arrays)))
  run = jax.grad(loss, argnums=every, has_aux=True)
  gradients, states = run(jnp.bfloat16, "xla", *float32(arrays))
  truth, true_states = run(jnp.float32, "reference", *float32(arrays))
  assert relative_error(states, np.asarray(true_states, np.float64)) < 1e-2
  for a, b in zip(gradients, truth, strict=True):
    assert a.dtype == jnp.float32 and relative_error(a, np.asarray(b, np.float64)) < 1e-2


def test_the_state_is_carried_in_float32():
  """4000 additions of an 8000th: in bfloat16 they would end at 1/64, where an 8000th is half of the last bit."""
  z = jnp.full((2, 4000, 4), 1.0, jnp.bfloat16)
  zero = jnp.zeros((4, 4))
  for implementation in ("reference", "xla"):
    run = kernels.lipschitz_rnn.lipschitz_rnn
    last = run(z, zero, zero, epsilon=1 / 8000, last=True, implementation=implementation)
    np.testing.assert_allclose(last, np.tanh(1) / 2, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("method,gated", FORMS, ids=FORM_NAMES)
def test_what_backward_keeps(implementation, last, method, gated):
  """ "mosaic" the inputs and the states; "xla" a state and a derivative of every stage, with a gate two arrays more."""
  z, a, w, *gate = float32(draw(5, 8, 30, 64, gated))
  run = lambda *arrays: ours(*arrays, method=method, implementation=implementation, last=last)
  with dispatch.compiling_for("gpu"):
    kept = jax.eval_shape(lambda *arrays: jax.tree.leaves(jax.vjp(run, *arrays)[1]), z, a, w, *gate)
  stages = {"euler": 1, "midpoint": 2, "rk4": 4}[method]
  arrays = 2 * stages + 2 * gated if implementation == "xla" else 2 + gated
  assert sum(array.size for array in kept) == arrays * z.size + 2 * a.size


def test_vmap_jit_and_checkpoint():
  z, a, w = float32(draw(6, 6, 10, 5, False))
  loss = lambda z, a, w: (ours(z, a, w, method="midpoint", last=True) ** 2).sum()
  truth = jax.grad(loss, argnums=(0, 1, 2))(z, a, w)
  for run in (jax.jit(loss), jax.checkpoint(loss)):
    for x, y in zip(jax.grad(run, argnums=(0, 1, 2))(z, a, w), truth, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  parts = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, None, None))(z.reshape(2, 3, 10, 5), a, w)
  for x, y in zip((parts[0].reshape(z.shape), parts[1].sum(0), parts[2].sum(0)), truth, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(a=(5, 4)), r"a has shape \(5, 4\), expected \(5, 5\)"),
    (dict(w=(4, 4)), r"w has shape \(4, 4\), expected \(5, 5\)"),
    (dict(z=(3, 5)), r"z has shape \(3, 5\), expected three axes"),
    (dict(z=(3, 0, 5)), r"z has shape \(3, 0, 5\), expected three axes that are not empty"),
    (dict(gate=(3, 6, 5)), r"gate has shape \(3, 6, 5\), expected \(3, 7, 5\)"),
    (dict(gate=(3, 7, 5), method="midpoint"), "method='midpoint': the gated form is defined for 'euler' alone"),
    (dict(method="rk5"), "method='rk5' is unknown; there are 'euler', 'midpoint', 'rk4'"),
    (dict(implementation="cuda"), "implementation='cuda' is unknown; there are 'reference', 'xla', 'mosaic'"),
    (dict(implementation="mosaic"), "implementation='mosaic' cannot serve: it needs an NVIDIA Hopper GPU"),
  ],
)
def test_wrong_arguments_are_refused(changes, message):
  shapes = dict(z=(3, 7, 5), a=(5, 5), w=(5, 5), gate=None) | {k: v for k, v in changes.items() if k in "z a w gate"}
  arrays = {name: None if shape is None else jnp.zeros(shape) for name, shape in shapes.items()}
  with pytest.raises(ValueError, match=message):
    ours(**arrays, **{k: v for k, v in changes.items() if k not in arrays})


def test_a_gate_of_another_dtype_is_refused():
  z = jnp.zeros((3, 7, 5))
  with pytest.raises(ValueError, match="gate has dtype bfloat16, expected z's, float32"):
    ours(z, jnp.zeros((5, 5)), jnp.zeros((5, 5)), z.astype(jnp.bfloat16))
