"""kernels.lstm against NumPy in float64, written from the equations, and its finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import rnn

import kernels.lstm
from kernels import dispatch
from kernels.lstm import cudnn, reference


def parameters(rng, channels, hidden, directions):
  shapes = [(channels, directions, 4 * hidden), (directions, hidden, 4 * hidden), *[(directions, 4 * hidden)] * 2]
  return [rng.uniform(-(hidden**-0.5), hidden**-0.5, shape) for shape in shapes]


def numpy_lstm(x_BTC, w_ih, w_hh, b_ih, b_hh, reverse):
  """The equations, one direction and one step at a time, in float64."""
  outputs = []
  for g, backward in enumerate(reverse):
    hidden = w_hh.shape[1]
    h = c = np.zeros((len(x_BTC), hidden))
    y = np.zeros((*x_BTC.shape[:2], hidden))
    times = range(x_BTC.shape[1])
    for t in reversed(times) if backward else times:
      a = x_BTC[:, t] @ w_ih[:, g] + b_ih[g] + h @ w_hh[g] + b_hh[g]
      i, f, o = (1 / (1 + np.exp(-a[:, k * hidden : (k + 1) * hidden])) for k in (0, 1, 3))
      c = f * c + i * np.tanh(a[:, 2 * hidden : 3 * hidden])
      h = o * np.tanh(c)
      y[:, t] = h
    outputs.append(y)
  return np.concatenate(outputs, -1)


def numpy_bilstm2d(x_BHWC, w_ih, w_hh, b_ih, b_hh):
  batch, rows, columns, channels = x_BHWC.shape
  columns_first = x_BHWC.transpose(0, 2, 1, 3).reshape(-1, rows, channels)
  down_up = numpy_lstm(columns_first, w_ih[:, :2], w_hh[:2], b_ih[:2], b_hh[:2], (False, True))
  down_up = down_up.reshape(batch, columns, rows, -1).transpose(0, 2, 1, 3)
  right_left = numpy_lstm(
    x_BHWC.reshape(-1, columns, channels), w_ih[:, 2:], w_hh[2:], b_ih[2:], b_hh[2:], (False, True)
  )
  return np.concatenate([down_up, right_left.reshape(batch, rows, columns, -1)], -1)


def relative_error(x, truth):
  return np.abs(np.asarray(x, np.float64) - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("batch,steps,channels,hidden", [(3, 7, 5, 4), (1, 1, 2, 3), (2, 33, 3, 8)])
def test_lstm_equals_numpy(implementation, reverse, batch, steps, channels, hidden):
  rng = np.random.RandomState(0)
  x = rng.randn(batch, steps, channels)
  arguments = parameters(rng, channels, hidden, len(reverse))
  truth = numpy_lstm(x, *arguments, reverse)
  y = kernels.lstm.lstm(*_float32(x, *arguments), reverse=reverse, implementation=implementation)
  assert y.dtype == jnp.float32
  assert relative_error(y, truth) < 2e-6


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("rows,columns", [(4, 4), (3, 5), (1, 6)])
def test_bilstm2d_equals_numpy(implementation, rows, columns):
  rng = np.random.RandomState(1)
  x = rng.randn(2, rows, columns, 6)
  arguments = parameters(rng, 6, 5, 4)
  y = kernels.lstm.bilstm2d(*_float32(x, *arguments), implementation=implementation)
  assert relative_error(y, numpy_bilstm2d(x, *arguments)) < 2e-6


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("rows,columns", [(4, 4), (3, 5)])
def test_gradient_equals_finite_differences(unroll, rows, columns):
  """The directional derivative along random directions, by central differences of the float64 NumPy forward."""
  rng = np.random.RandomState(2)
  x = rng.randn(2, rows, columns, 3)
  arguments = [x, *parameters(rng, 3, 4, 4)]
  weight = rng.randn(2, rows, columns, 16)

  def loss(*arrays):
    return (kernels.lstm.bilstm2d(*arrays, unroll=unroll) * weight.astype(np.float32)).sum()

  gradients = jax.grad(loss, argnums=tuple(range(5)))(*_float32(*arguments))
  for index, gradient in enumerate(gradients):
    direction = rng.randn(*arguments[index].shape)
    shifted = [[a + sign * 1e-6 * direction if k == index else a for k, a in enumerate(arguments)] for sign in (1, -1)]
    above, below = ((numpy_bilstm2d(*arrays) * weight).sum() for arrays in shifted)
    truth = (above - below) / 2e-6
    assert abs((np.asarray(gradient, np.float64) * direction).sum() - truth) < 2e-5 * np.abs(truth) + 1e-4


@pytest.mark.parametrize("rows,columns", [(5, 5), (2, 7)])
def test_xla_equals_reference_with_gradients(rows, columns):
  rng = np.random.RandomState(3)
  arrays = _float32(rng.randn(2, rows, columns, 6), *parameters(rng, 6, 8, 4))

  def loss(implementation, *arrays):
    return (kernels.lstm.bilstm2d(*arrays, implementation=implementation) ** 2).sum()

  every = tuple(range(1, 6))
  ours = jax.jit(jax.grad(loss, argnums=every), static_argnums=0)("xla", *arrays)
  truth = jax.grad(loss, argnums=every)("reference", *arrays)
  for a, b in zip(ours, truth, strict=True):
    assert relative_error(a, np.asarray(b, np.float64)) < 5e-6


def test_bfloat16_keeps_float32_carries():
  """200 steps of slow forgetting: a bfloat16 cell state would lose the small additions."""
  rng = np.random.RandomState(4)
  x = rng.randn(2, 200, 4)
  arguments = parameters(rng, 4, 8, 1)
  arguments[2][:, 8:16] += 5.0  # forget gates near 1
  truth = numpy_lstm(x, *arguments, (False,))
  y = kernels.lstm.lstm(jnp.asarray(x, jnp.bfloat16), *_float32(*arguments), reverse=(False,))
  assert y.dtype == jnp.bfloat16
  assert np.linalg.norm(np.asarray(y, np.float64) - truth) < 2e-2 * np.linalg.norm(truth)


def test_wrong_shapes_and_names_are_refused():
  rng = np.random.RandomState(5)
  x, w_ih, w_hh, b_ih, b_hh = _float32(rng.randn(2, 3, 4), *parameters(rng, 4, 5, 2))
  with pytest.raises(ValueError, match="w_ih has shape"):
    kernels.lstm.lstm(x, w_ih[:-1], w_hh, b_ih, b_hh)
  with pytest.raises(ValueError, match="expected 4 axes"):
    kernels.lstm.bilstm2d(x, w_ih, w_hh, b_ih, b_hh)
  with pytest.raises(ValueError, match="implementation='cuda' is unknown; there are 'reference', 'xla'"):
    kernels.lstm.lstm(x, w_ih, w_hh, b_ih, b_hh, implementation="cuda")


@jax.custom_vjp
def _product_of_cut(h, w):
  """h w as tensor cores may take it in TF32: the last 13 bits of every operand are dropped, not rounded."""
  return _cut(h) @ _cut(w)


def _cut(x):
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & ~0x1FFF, jnp.float32)


_product_of_cut.defvjp(
  lambda h, w: (_product_of_cut(h, w), (h, w)),
  lambda kept, dz: (_cut(dz) @ _cut(kept[1]).T, jnp.einsum("nbk,nbf->kf", kept[0], dz)),  # the latter after the kernel
)


@pytest.mark.parametrize("hidden,scale", [(96, 1.0), (256, 1.0), (128, 1.5)])
def test_products_in_tf32_keep_to_their_bound(hidden, scale, monkeypatch):
  """What the interpreter cannot show of "mosaic" in float32, as it computes products exactly: 1e-3 of the norm."""
  rng = np.random.RandomState(14)
  z, w_hh = _float32(
    rng.randn(4, 64, 1, 4 * hidden), rng.uniform(-scale, scale, (1, hidden, 4 * hidden)) * hidden**-0.5
  )
  cotangent = jnp.asarray(rng.randn(4, 64, 1, hidden), jnp.float32)

  def both():
    y, pull = jax.vjp(lambda *a: reference.recurrence(*a, ((1, False),)), z, w_hh)
    return y, *pull(cotangent)

  truth = both()
  monkeypatch.setattr(reference.jnp, "matmul", lambda h, w, **_: _product_of_cut(h, w))
  for ours, exact in zip(both(), truth, strict=True):
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 5e-4


@pytest.fixture
def cudnn_by_jax(monkeypatch):
  """In place of cuDNN: JAX's own reference of it, in jnp, which reads the same packed weights."""

  def lstm(x, h_0, c_0, weights, lengths, channels, hidden, layers, dropout, bidirectional, precision):
    sizes = channels, hidden, layers
    unpacked = rnn.unpack_lstm_weights(weights, *sizes, bidirectional)
    return rnn.lstm_ref(x, h_0, c_0, *unpacked, lengths, *sizes, dropout, bidirectional)

  monkeypatch.setattr(rnn, "lstm", lstm)
  monkeypatch.setattr(cudnn, "refuse", lambda *_: None)


@pytest.fixture
def cudnn_without_a_gpu(monkeypatch):
  """As if cuDNN were here, as far as tracing goes."""
  monkeypatch.setattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes", lambda *_: (2, 3), raising=False)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_cudnn_weights_are_packed_as_they_are_unpacked():
  rng = np.random.RandomState(6)
  w_ih, w_hh, b_ih, b_hh = _float32(*parameters(rng, 3, 5, 2))
  packed = cudnn.pack(w_ih, w_hh, b_ih, b_hh)
  assert packed.shape == (rnn.get_num_params_in_lstm(3, 5, 1, True),)
  unpacked = rnn.unpack_lstm_weights(packed, 3, 5, 1, True)
  for g in range(2):
    for ours, theirs in zip((w_ih[:, g].T, w_hh[g].T, b_ih[g], b_hh[g]), unpacked, strict=True):
      np.testing.assert_array_equal(ours, theirs[g])


@pytest.mark.parametrize("shape,directions", [((3, 7, 5), 1), ((3, 7, 5), 2), ((2, 4, 4, 5), 4), ((2, 3, 5, 5), 4)])
def test_cudnn_equals_reference_with_gradients(cudnn_by_jax, shape, directions):
  rng = np.random.RandomState(7)
  arrays = _float32(rng.randn(*shape), *parameters(rng, 5, 6, directions))

  def run(implementation, *arrays):
    if len(shape) == 4:
      return kernels.lstm.bilstm2d(*arrays, implementation=implementation)
    return kernels.lstm.lstm(*arrays, reverse=(False, True)[:directions], implementation=implementation)

  ours, pull = jax.vjp(lambda *a: run("cudnn", *a), *arrays)
  truth, true_pull = jax.vjp(lambda *a: run("reference", *a), *arrays)
  cotangent = jnp.asarray(rng.randn(*ours.shape), jnp.float32)
  for a, b in zip((ours, *pull(cotangent)), (truth, *true_pull(cotangent)), strict=True):
    assert relative_error(a, np.asarray(b, np.float64)) < 5e-6


def test_cudnn_is_differentiated_and_keeps_to_the_precision_asked_for(cudnn_without_a_gpu):
  """Traced only: cuDNN's forward pass and its gradient, in float32 for a bfloat16 input."""
  rng = np.random.RandomState(8)
  x, *weights = _float32(rng.randn(2, 3, 4), *parameters(rng, 4, 5, 2))

  def loss(x, *weights):
    y = kernels.lstm.lstm(x, *weights, implementation="cudnn")
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 10)
    return (y.astype(jnp.float32) ** 2).sum()

  for precision, allowed in ((None, True), ("highest", False)):
    with jax.default_matmul_precision(precision):
      jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=range(5)))(x.astype(jnp.bfloat16), *weights)
    ours = [e for e in jaxpr.eqns if e.primitive in (rnn.rnn_fwd_p, rnn.rnn_bwd_p)]
    assert [e.primitive for e in ours] == [rnn.rnn_fwd_p, rnn.rnn_bwd_p]
    assert all(e.params["bidirectional"] and e.params["cudnn_allow_tf32"] == allowed for e in ours)
    assert [(a.shape, a.dtype) for a in jaxpr.out_avals] == [
      ((2, 3, 4), jnp.bfloat16),
      *((w.shape, jnp.float32) for w in weights),
    ]


def test_cudnn_refuses_where_it_is_not():
  rng = np.random.RandomState(9)
  arrays = _float32(rng.randn(2, 3, 3, 4), *parameters(rng, 4, 5, 4))
  refused = pytest.raises(dispatch.UnsupportedError, match=r"bilstm2d: .*'cudnn' cannot serve: .* GPU, and this is cpu")
  with dispatch.compiling_for("cpu"), refused:
    kernels.lstm.bilstm2d(*arrays, implementation="cudnn")
  with dispatch.compiling_for("gpu"), pytest.raises(dispatch.UnsupportedError, match="asks cuDNN for sizes while"):
    kernels.lstm.bilstm2d(*arrays, implementation="cudnn")


@pytest.mark.parametrize(
  "shape,dtype,reverse,reason",
  [
    ((2, 3, 4), jnp.float16, (False,), "float32 or bfloat16, and the input is float16"),
    ((2, 0, 4), jnp.float32, (False,), r"an input of shape \(2, 0, 4\) is empty"),
    ((2, 3, 4), jnp.float32, (True,), r"reverse=\(False,\) or \(False, True\), not \(True,\)"),
  ],
)
def test_cudnn_refuses_what_it_cannot_do(cudnn_without_a_gpu, shape, dtype, reverse, reason):
  weights = _float32(*parameters(np.random.RandomState(10), 4, 5, len(reverse)))
  with pytest.raises(dispatch.UnsupportedError, match=f"'cudnn' cannot serve: .*{reason}"):
    kernels.lstm.lstm(jnp.zeros(shape, dtype), *weights, reverse=reverse, implementation="cudnn")


def test_cudnn_has_no_vmap(cudnn_without_a_gpu):
  rng = np.random.RandomState(11)
  x, *weights = _float32(rng.randn(2, 2, 3, 4), *parameters(rng, 4, 5, 2))
  with pytest.raises(dispatch.UnsupportedError, match=r"'cudnn' cannot serve: .*rnn_fwd"):
    jax.eval_shape(jax.vmap(lambda x: kernels.lstm.lstm(x, *weights, implementation="cudnn")), x)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("shape,directions", [((3, 7, 5), 1), ((64, 33, 96), 2), ((2, 8, 8, 24), 4), ((2, 3, 5, 5), 4)])
def test_cudnn_itself_equals_reference_with_gradients(shape, directions):
  rng = np.random.RandomState(12)
  arrays = _float32(rng.randn(*shape), *parameters(rng, shape[-1], 48, directions))

  def both(implementation, *arrays):
    def run(*arrays):
      if len(shape) == 4:
        return kernels.lstm.bilstm2d(*arrays, implementation=implementation)
      return kernels.lstm.lstm(*arrays, reverse=(False, True)[:directions], implementation=implementation)

    y, pull = jax.vjp(run, *arrays)
    return y, *pull(jnp.cos(y))

  with jax.default_matmul_precision("highest"):
    ours, truth = (jax.jit(both, static_argnums=0)(name, *arrays) for name in ("cudnn", "reference"))
  for a, b in zip(ours, truth, strict=True):
    assert relative_error(a, np.asarray(b, np.float64)) < 1e-4


def _float32(*arrays):
  return [jnp.asarray(a, jnp.float32) for a in arrays]
