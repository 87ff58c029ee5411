"""Weights that nothing can hide behind: public models start with heads and norms at zero or one."""

import torch


def randomize(module: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
  """Adds noise to every tensor, running statistics of BatchNorm included (variances stay positive); evaluation mode."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
      if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator) * std
        tensor.add_(noise.abs() if name.endswith("running_var") else noise)
  return module.eval()
