"""Reference forward passes in plain NumPy float64: the independent truth that the tests compare the models with.

Written from the equations of the papers, as plainly as possible (a python loop over time where the paper has a
recurrence), in evaluation mode (no dropout; batch norm with stored statistics). Nothing here uses the package under
test. Weights come as plain dicts of arrays in the layout of the original code:

* TrellisNet and LipschitzRNN come from torch: a linear weight is (out, in), a convolution weight is (out, in, k);
* the Long Range Arena Transformer, S5 and the LRU come from flax: a Dense kernel is (in, out).

Shape letters: B batch, L length, C input channels, S classes, H model width, P or N states, D embedding width.
"""

import math

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Elementary functions
# ---------------------------------------------------------------------------------------------------------------------


def sigmoid(x):
  """1 / (1 + e^-x), any shape; in the tanh form, which cannot overflow."""
  return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, np.float64)))


def gelu_exact(x):
  """x Φ(x) with the normal distribution function Φ (arXiv 1606.08415), any shape; torch's default."""
  x = np.asarray(x, np.float64)
  return 0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))


def gelu_tanh(x):
  """The tanh approximation of GELU (arXiv 1606.08415, section 2), any shape; the default of jax and flax."""
  x = np.asarray(x, np.float64)
  return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x, axis=-1):
  """e^x / Σ e^x along `axis`, any shape."""
  x = np.asarray(x, np.float64)
  e = np.exp(x - x.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def layer_norm(x, scale, bias, eps=1e-6):
  """Layer normalisation over the last axis with the biased variance (arXiv 1607.06450); x (..., D), scale, bias (D,).

  eps is 1e-6 in flax and 1e-5 in torch.
  """
  x = np.asarray(x, np.float64)
  mean = x.mean(axis=-1, keepdims=True)
  var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
  return (x - mean) / np.sqrt(var + eps) * scale + bias


def batch_norm(x, mean, var, scale, bias, eps=1e-5):
  """Batch normalisation in evaluation mode (arXiv 1502.03167, algorithm 2); x (..., D), the rest (D,)."""
  return (np.asarray(x, np.float64) - mean) / np.sqrt(np.asarray(var, np.float64) + eps) * scale + bias


def _dense(x, p):
  """x (..., in) to (..., out) with p = {kernel (in, out), bias (out,)}."""
  return x @ p["kernel"] + p["bias"]


# ---------------------------------------------------------------------------------------------------------------------
# TrellisNet (arXiv 1810.06682)
# ---------------------------------------------------------------------------------------------------------------------


def weight_norm(v, g):
  """w = g v / ‖v‖ with one norm for each output channel (arXiv 1602.07868, eq. 2); v (out, in, k), g (out,)."""
  v = np.asarray(v, np.float64)
  w = np.empty_like(v)
  for o in range(v.shape[0]):
    w[o] = g[o] * v[o] / math.sqrt((v[o] ** 2).sum())
  return w


def _trellis_weights(w):
  """The two convolution kernels (4H, C, k) and (4H, H, k), with or without weight normalisation."""
  kernels = []
  for name in ("weight1", "weight2"):
    v = np.asarray(w[name + "_v"], np.float64)
    kernels.append(weight_norm(v, w[name + "_g"]) if name + "_g" in w else v)
  return kernels


def trellisnet_states(x_BLC, w, *, dilations):
  """All hidden and cell states of a TrellisNet, one pair for each level (arXiv 1810.06682, with LSTM gates).

  At every level the pre-activation of time t is a causal dilated convolution of the input (injected anew at each level)
  and of the hidden states of the level below, with the same weights at all levels,

    a_t = b + Σ_j W1_j x_{t-(k-1-j)d} + W2_j h_{t-(k-1-j)d},        everything before the first step is zero,

  split into the gates i, o, g, f (in this order; g with tanh, the others with the sigmoid), and then

    c'_t = f c_{t-d} + i g,    h'_t = o tanh(c'_t).

  Args:
    x_BLC: the input sequence.
    w: weight1_v (4H, C, k), weight2_v (4H, H, k), bias2 (4H,); with weight normalisation weight1_g, weight2_g (4H,).
    dilations: one dilation d for each level.

  Returns:
    A list of (h_BLH, c_BLH), one for each level.
  """
  x = np.asarray(x_BLC, np.float64)
  w1, w2 = _trellis_weights(w)
  batch, length, _ = x.shape
  width, taps = w2.shape[1], w2.shape[2]
  h = np.zeros((batch, length, width))
  c = np.zeros((batch, length, width))
  levels = []
  for d in dilations:
    new_h = np.zeros_like(h)
    new_c = np.zeros_like(c)
    for t in range(length):
      a = np.tile(np.asarray(w["bias2"], np.float64), (batch, 1))
      for j in range(taps):
        past = t - (taps - 1 - j) * d
        if past >= 0:
          a = a + x[:, past] @ w1[:, :, j].T + h[:, past] @ w2[:, :, j].T
      i = sigmoid(a[:, :width])
      o = sigmoid(a[:, width : 2 * width])
      g = np.tanh(a[:, 2 * width : 3 * width])
      f = sigmoid(a[:, 3 * width :])
      # The cell moves by d, not by (k - 1) d, for every kernel size k.
      c_past = c[:, t - d] if t - d >= 0 else np.zeros((batch, width))
      new_c[:, t] = f * c_past + i * g
      new_h[:, t] = o * np.tanh(new_c[:, t])
    h, c = new_h, new_c
    levels.append((h, c))
  return levels


def trellisnet(x_BLC, w, *, dilations, nout):
  """The TrellisNet classifier of pixel sequences (arXiv 1810.06682), before the log-softmax.

  The last `nout` channels of the hidden state of the last level at the last step feed a linear head.

  Args:
    x_BLC: the input sequence.
    w: weight1_v (4H, C, k), weight2_v (4H, H, k), bias2 (4H,), head_weight (S, nout), head_bias (S,); weight1_g and
      weight2_g (4H,) where the kernels are weight-normalised (a missing g: the v array is the kernel itself).
    dilations: one dilation for each level.
    nout: the number of output channels, the last of the H channels.

  Returns:
    Logits (B, S).
  """
  h, _ = trellisnet_states(x_BLC, w, dilations=dilations)[-1]
  return h[:, -1, -nout:] @ np.asarray(w["head_weight"], np.float64).T + w["head_bias"]


# ---------------------------------------------------------------------------------------------------------------------
# LipschitzRNN (arXiv 2006.12070)
# ---------------------------------------------------------------------------------------------------------------------


def lipschitz_matrix(m, beta, gamma):
  """The symmetric-skew matrix M_{β,γ} = β(M - Mᵀ) + (1 - β)(M + Mᵀ) - γI (arXiv 2006.12070); m (n, n) to (n, n).

  The paper allows one pair β, γ for A and another for W; the official code has one for both.
  """
  m = np.asarray(m, np.float64)
  return beta * (m - m.T) + (1.0 - beta) * (m + m.T) - gamma * np.eye(m.shape[0])


def lipschitz_rnn(x_BLC, w, *, beta, gamma, epsilon, method="euler", gated=False):
  """The Lipschitz recurrent classifier (arXiv 2006.12070) from the state zero.

  With the symmetric-skew matrices A of B and W of C, row vectors, and the input held during a step of size ε,

    h' = h A + tanh(h W + z_t),    z_t = E x_t + bias,

  and for the gated form, Euler only,

    h <- h + ε (h A + tanh(h W + z_t)) σ(h W + E_g x_t + bias).

  The head reads the state after the last step.

  Args:
    x_BLC: the input sequence.
    w: E_weight (n, C), E_bias (n,), B (n, n), C (n, n), D_weight (S, n), D_bias (S,); gated: Eg_weight (n, C),
      Eg_bias (n,).
    beta, gamma: the constants of `lipschitz_matrix`.
    epsilon: the step size.
    method: "euler", "midpoint", or "rk4" (the fourth-order 3/8 rule, which is the "rk4" of torchdiffeq).
    gated: whether to use the gated form.

  Returns:
    Logits (B, S).
  """
  if method not in ("euler", "midpoint", "rk4"):
    raise ValueError(f"method: {method!r}")
  if gated and method != "euler":
    raise ValueError("the gated form is defined for Euler steps only")
  x = np.asarray(x_BLC, np.float64)
  e = float(epsilon)
  a = lipschitz_matrix(w["B"], beta, gamma)
  m = lipschitz_matrix(w["C"], beta, gamma)
  h = np.zeros((x.shape[0], a.shape[0]))
  for t in range(x.shape[1]):
    z = x[:, t] @ np.asarray(w["E_weight"], np.float64).T + w["E_bias"]

    def rate(state, z=z):
      return state @ a + np.tanh(state @ m + z)

    if gated:
      z_gate = x[:, t] @ np.asarray(w["Eg_weight"], np.float64).T + w["Eg_bias"]
      h = h + e * rate(h) * sigmoid(h @ m + z_gate)
    elif method == "euler":
      h = h + e * rate(h)
    elif method == "midpoint":
      k1 = rate(h)
      h = h + e * rate(h + 0.5 * e * k1)
    else:
      k1 = rate(h)
      k2 = rate(h + e * k1 / 3.0)
      k3 = rate(h + e * (k2 - k1 / 3.0))
      k4 = rate(h + e * (k1 - k2 + k3))
      h = h + e * (k1 + 3.0 * k2 + 3.0 * k3 + k4) / 8.0
  return h @ np.asarray(w["D_weight"], np.float64).T + w["D_bias"]


# ---------------------------------------------------------------------------------------------------------------------
# The Transformer of the Long Range Arena (arXiv 2011.04006)
# ---------------------------------------------------------------------------------------------------------------------


def attention(x_BLD, q, k, v, out, *, heads, mask_BL=None):
  """Multi-head self-attention without biases (arXiv 1706.03762, eq. 1), scores divided by sqrt(head width).

  Args:
    x_BLD: the tokens.
    q, k, v: kernels (D, QKV); head n owns the columns n·QKV/heads to (n+1)·QKV/heads - 1.
    out: kernel (QKV, D).
    heads: the number of heads.
    mask_BL: true where a token takes part. A pair is allowed where both tokens take part; the scores of all other pairs
      are set to -1e10. So a query that does not take part looks at all keys uniformly, which is what the original does
      in float32 (it adds -1e10, and the score is lost in the rounding).

  Returns:
    (B, L, D).
  """
  batch, length, _ = x_BLD.shape
  size = q.shape[1] // heads
  result = np.zeros((batch, length, q.shape[1]))
  for b in range(batch):
    for n in range(heads):
      part = slice(n * size, (n + 1) * size)
      queries, keys, values = x_BLD[b] @ q[:, part], x_BLD[b] @ k[:, part], x_BLD[b] @ v[:, part]
      scores = queries @ keys.T / math.sqrt(size)
      if mask_BL is not None:
        scores = np.where(np.outer(mask_BL[b], mask_BL[b]), scores, -1e10)
      result[b, :, part] = softmax(scores) @ values
  return result @ out


def lra_transformer(tokens_BL, w, *, heads, pool, mask_zero=False):
  """The pre-norm Transformer classifier of the Long Range Arena benchmark (arXiv 2011.04006).

  Embed; put the class token in front (pool "cls"); add learned positions, to the class token too; for each layer
  x <- x + Attention(LN x), then x <- x + Dense(GELU(Dense(LN x))); LN; take the class token or the mean over length;
  Dense, ReLU, Dense. LayerNorm has eps 1e-6 and GELU is the tanh form (flax).

  Args:
    tokens_BL: integer tokens.
    w: embed (V, D), cls (1, 1, D) for pool "cls", position (L+1, D) for "cls" or (L, D) for "mean" (only the first rows
      are used where there are more), norm_scale, norm_bias (D,), head1_kernel (D, M), head1_bias, head2_kernel (M, S),
      head2_bias, and layers: a list of dicts with ln1_scale, ln1_bias, q, k, v (D, QKV), out (QKV, D), ln2_scale,
      ln2_bias, fc1_kernel (D, M), fc1_bias, fc2_kernel (M, D), fc2_bias.
    heads: the number of heads.
    pool: "cls" or "mean".
    mask_zero: whether tokens of value 0 are kept out of the attention, as in the original, where 0 is the padding (in
      images, the black pixels). The class token then shares the mask of the first token. See `attention`.

  Returns:
    Logits (B, S).
  """
  if pool not in ("cls", "mean"):
    raise ValueError(f"pool: {pool!r}")
  tokens = np.asarray(tokens_BL)
  x = np.asarray(w["embed"], np.float64)[tokens]
  mask = tokens > 0
  if pool == "cls":
    x = np.concatenate([np.tile(w["cls"], (x.shape[0], 1, 1)), x], axis=1)
    mask = np.concatenate([mask[:, :1], mask], axis=1)
  x = x + np.asarray(w["position"], np.float64)[: x.shape[1]]
  for p in w["layers"]:
    y = layer_norm(x, p["ln1_scale"], p["ln1_bias"], 1e-6)
    x = x + attention(y, p["q"], p["k"], p["v"], p["out"], heads=heads, mask_BL=mask if mask_zero else None)
    y = layer_norm(x, p["ln2_scale"], p["ln2_bias"], 1e-6)
    x = x + gelu_tanh(y @ p["fc1_kernel"] + p["fc1_bias"]) @ p["fc2_kernel"] + p["fc2_bias"]
  x = layer_norm(x, w["norm_scale"], w["norm_bias"], 1e-6)
  x = x[:, 0] if pool == "cls" else x.mean(axis=1)
  x = np.maximum(x @ w["head1_kernel"] + w["head1_bias"], 0.0)
  return x @ w["head2_kernel"] + w["head2_bias"]


# ---------------------------------------------------------------------------------------------------------------------
# S5 (arXiv 2208.04933)
# ---------------------------------------------------------------------------------------------------------------------


def diagonal_scan(a_P, inputs_LP):
  """x_t = a x_{t-1} + input_t from x_{-1} = 0, one step after the other; a (P,), inputs (L, P) to complex (L, P)."""
  x = np.zeros(a_P.shape, np.complex128)
  states = np.zeros(inputs_LP.shape, np.complex128)
  for t in range(inputs_LP.shape[0]):
    x = a_P * x + inputs_LP[t]
    states[t] = x
  return states


def s5_layer(u_LH, w, *, bidirectional=False, conj_sym=True, clip_eigs=False):
  """The S5 state space layer (arXiv 2208.04933), step by step.

  Zero-order hold with one step Δ = exp(log_step) for each state,

    Λ̄ = exp(Λ Δ),    B̄ = Λ^-1 (Λ̄ - 1) B,    x_t = Λ̄ x_{t-1} + B̄ u_t,    y_t = Re(C x_t) + D u_t.

  Args:
    u_LH: the input sequence.
    w: Lambda (P,) complex, B (P, H) complex, C (H, P) complex (bidirectional: (H, 2P), the first P columns for the
      forward states and the last P for the backward states), D (H,), log_step (P,).
    bidirectional: whether a second pass runs from the end to the start (same Λ̄ and B̄, its own C).
    conj_sym: whether the P states stand for P conjugate pairs: y_t = 2 Re(C x_t) + D u_t.
    clip_eigs: whether the real parts of Λ are first cut at -1e-4 from above.

  Returns:
    (L, H).
  """
  u = np.asarray(u_LH, np.float64)
  eigenvalues = np.asarray(w["Lambda"], np.complex128)
  if clip_eigs:
    eigenvalues = np.minimum(eigenvalues.real, -1e-4) + 1j * eigenvalues.imag
  step = np.exp(np.asarray(w["log_step"], np.float64))
  a = np.exp(eigenvalues * step)
  b = ((a - 1.0) / eigenvalues)[:, None] * np.asarray(w["B"], np.complex128)
  inputs = u @ b.T
  states = diagonal_scan(a, inputs)
  if bidirectional:
    backward = diagonal_scan(a, inputs[::-1])[::-1]
    states = np.concatenate([states, backward], axis=1)
  y = (states @ np.asarray(w["C"], np.complex128).T).real
  return (2.0 * y if conj_sym else y) + np.asarray(w["D"], np.float64) * u


def _normalise(x, p, norm):
  """Batch norm with stored statistics (eps 1e-5) or layer norm (eps 1e-6); x (..., H), p the arrays of the norm."""
  if norm == "batch":
    return batch_norm(x, p["mean"], p["var"], p["scale"], p["bias"], 1e-5)
  if norm == "layer":
    return layer_norm(x, p["scale"], p["bias"], 1e-6)
  raise ValueError(f"norm: {norm!r}")


def _activate(x, p, activation):
  """The activation that follows the state space layer (arXiv 2208.04933); x (..., H) to (..., H).

  gelu: GELU x; full_glu: out1(GELU x) σ(out2(GELU x)); half_glu1: GELU x σ(out2(GELU x)); half_glu2: x σ(out2(GELU x)).
  """
  y = gelu_tanh(x)
  if activation == "gelu":
    return y
  if activation == "full_glu":
    return _dense(y, p["out1"]) * sigmoid(_dense(y, p["out2"]))
  if activation == "half_glu1":
    return y * sigmoid(_dense(y, p["out2"]))
  if activation == "half_glu2":
    return x * sigmoid(_dense(y, p["out2"]))
  raise ValueError(f"activation: {activation!r}")


def _deep_classifier(x_BLC, w, mixer, *, activation, norm, prenorm, pool):
  """Dense; layers of norm, mixer, activation, skip (norm last where not prenorm); pooling over length; Dense.

  mixer(u_LH, layer) -> y_LH gets one sequence and the dict of the layer. Returns logits (B, S).
  """
  if pool not in ("mean", "last"):
    raise ValueError(f"pool: {pool!r}")
  x = _dense(np.asarray(x_BLC, np.float64), w["encoder"])
  for p in w["layers"]:
    y = _normalise(x, p["norm"], norm) if prenorm else x
    y = np.stack([mixer(u_LH, p) for u_LH in y])
    x = x + _activate(y, p, activation)
    if not prenorm:
      x = _normalise(x, p["norm"], norm)
  x = x.mean(axis=1) if pool == "mean" else x[:, -1]
  return _dense(x, w["decoder"])


def s5(
  x_BLC,
  w,
  *,
  activation="half_glu1",
  prenorm=True,
  norm="batch",
  bidirectional=False,
  conj_sym=True,
  clip_eigs=False,
  pool="mean",
):
  """The deep S5 classifier in evaluation mode (arXiv 2208.04933), before the log-softmax.

  Dense; for each layer x <- x + activation(SSM(norm(x))) (prenorm) or x <- norm(x + activation(SSM(x))); mean over
  length (or the last step); Dense. There is no norm after the last layer.

  Args:
    x_BLC: the input sequence.
    w: {"encoder": {kernel (C, H), bias (H,)}, "layers": [layer, ...], "decoder": {kernel (H, S), bias (S,)}}, with
      layer = {"norm": {scale, bias, and for batch norm mean, var; all (H,)},
               "ssm": {Lambda, B, C, D, log_step} as in `s5_layer`,
               "out1": {kernel (H, H), bias (H,)} for "full_glu" only,
               "out2": {kernel (H, H), bias (H,)} for all but "gelu"}.
    activation: "half_glu1", "half_glu2", "full_glu" or "gelu"; GELU is the tanh form throughout.
    prenorm: whether the norm comes before the state space layer or after the skip connection.
    norm: "batch" (stored statistics, eps 1e-5) or "layer" (eps 1e-6).
    bidirectional, conj_sym, clip_eigs: see `s5_layer`.
    pool: "mean" or "last".

  Returns:
    Logits (B, S).
  """

  def mixer(u_LH, layer):
    return s5_layer(u_LH, layer["ssm"], bidirectional=bidirectional, conj_sym=conj_sym, clip_eigs=clip_eigs)

  return _deep_classifier(x_BLC, w, mixer, activation=activation, norm=norm, prenorm=prenorm, pool=pool)


# ---------------------------------------------------------------------------------------------------------------------
# LRU (arXiv 2303.06349)
# ---------------------------------------------------------------------------------------------------------------------


def lru_layer(u_LH, w):
  """The linear recurrent unit (arXiv 2303.06349, appendix A), step by step.

    λ = exp(-exp(ν_log) + i exp(θ_log)),    h_t = λ h_{t-1} + exp(γ_log) (B u_t),    y_t = Re(C h_t) + D u_t.

  Args:
    u_LH: the input sequence.
    w: nu_log, theta_log, gamma_log (N,), B_re, B_im (N, H), C_re, C_im (H, N), D (H,), all real.

  Returns:
    (L, H).
  """
  u = np.asarray(u_LH, np.float64)
  p = {name: np.asarray(value, np.float64) for name, value in w.items()}
  eigenvalues = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
  b = p["B_re"] + 1j * p["B_im"]
  c = p["C_re"] + 1j * p["C_im"]
  inputs = np.exp(p["gamma_log"]) * (u @ b.T)
  states = diagonal_scan(eigenvalues, inputs)
  return (states @ c.T).real + p["D"] * u


def lru(x_BLC, w, *, norm="batch", prenorm=True, pool="mean"):
  """The deep LRU classifier in evaluation mode (arXiv 2303.06349, figure 1 and appendix D), before the log-softmax.

  Dense; for each layer x <- x + GLU(GELU(LRU(norm(x)))) (prenorm) or x <- norm(x + GLU(GELU(LRU(x)))), with
  GLU(y) = out1(y) σ(out2(y)) and the tanh form of GELU; mean over length (or the last step); Dense. There is no norm
  after the last layer.

  Args:
    x_BLC: the input sequence.
    w: {"encoder": {kernel (C, H), bias (H,)}, "layers": [layer, ...], "decoder": {kernel (H, S), bias (S,)}}, with
      layer = {"norm": {scale, bias, and for batch norm mean, var; all (H,)},
               "lru": {nu_log, theta_log, gamma_log, B_re, B_im, C_re, C_im, D} as in `lru_layer`,
               "out1": {kernel (H, H), bias (H,)}, "out2": {kernel (H, H), bias (H,)}}.
    norm: "batch" (stored statistics, eps 1e-5) or "layer" (eps 1e-6).
    prenorm: whether the norm comes before the recurrence or after the skip connection.
    pool: "mean" or "last".

  Returns:
    Logits (B, S).
  """

  def mixer(u_LH, layer):
    return lru_layer(u_LH, layer["lru"])

  return _deep_classifier(x_BLC, w, mixer, activation="full_glu", norm=norm, prenorm=prenorm, pool=pool)
