"""kernels.lstm against `torch.nn.LSTM`: values, and gradients of the input and all weights."""

import jax
import numpy as np
import pytest
import torch

import kernels.lstm


def torch_lstm(channels, hidden, bidirectional):
  module = torch.nn.LSTM(channels, hidden, batch_first=True, bidirectional=bidirectional)
  ways = ["", "_reverse"] if bidirectional else [""]
  get = lambda kind: np.stack([getattr(module, f"{kind}_l0{way}").detach().numpy() for way in ways])
  weights = [get("weight_ih").transpose(2, 0, 1), get("weight_hh").transpose(0, 2, 1), get("bias_ih"), get("bias_hh")]
  back = {
    "weight_ih": lambda a: a.transpose(1, 2, 0),
    "weight_hh": lambda a: a.transpose(0, 2, 1),
    "bias_ih": lambda a: a,
    "bias_hh": lambda a: a,
  }
  gradients = lambda: [np.stack([getattr(module, f"{kind}_l0{way}").grad.numpy() for way in ways]) for kind in back]
  return module, weights, list(back.values()), gradients


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
  "batch,steps,channels,hidden,two", [(3, 16, 12, 8, True), (1, 7, 5, 3, True), (4, 9, 6, 10, False)]
)
def test_values_and_gradients(implementation, batch, steps, channels, hidden, two):
  module, weights, back, torch_gradients = torch_lstm(channels, hidden, two)
  x = torch.randn(batch, steps, channels, requires_grad=True)
  y, _ = module(x)
  cotangent = torch.randn_like(y)
  (y * cotangent).sum().backward()

  def run(x, *weights):
    reverse = (False, True) if two else (False,)
    return kernels.lstm.lstm(x, *weights, reverse=reverse, implementation=implementation)

  ours, vjp = jax.vjp(run, x.detach().numpy(), *weights)
  np.testing.assert_allclose(ours, y.detach().numpy(), rtol=1e-5, atol=1e-6)
  dx, *dweights = vjp(cotangent.numpy())
  np.testing.assert_allclose(dx, x.grad.numpy(), rtol=1e-4, atol=1e-6)
  for gradient, to_torch, truth in zip(dweights, back, torch_gradients(), strict=True):
    gradient = to_torch(np.asarray(gradient))
    assert np.abs(gradient - truth).max() < 1e-5 * np.abs(truth).max()
