"""Public PyTorch implementations. The tests skip where torch is not installed; `make parity` installs it."""

import enum
import importlib.util
import sys
import types

import jax
import pytest

if importlib.util.find_spec("torch") is None:
  collect_ignore_glob = ["test_*.py"]
else:
  jax.config.update("jax_default_matmul_precision", "highest")


class _Stub(types.ModuleType):
  """Whatever is asked of it is an empty class."""

  __path__ = ()

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return type(name, (), {})


def _stand_in_for_torchvision():
  """timm imports torchvision for its data pipeline, of which nothing is used here."""
  names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
  modules = {f"torchvision{name}": _Stub(f"torchvision{name}") for name in names}
  modes = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "nearest-exact")
  mode = enum.Enum("InterpolationMode", {m.upper().replace("-", "_"): m for m in modes})
  modules["torchvision.transforms"].InterpolationMode = mode
  modules["torchvision.transforms.functional"].InterpolationMode = mode
  for name, module in modules.items():
    parent, _, child = name.rpartition(".")
    if parent:
      setattr(modules[parent], child, module)
  sys.modules.update(modules)


if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("torchvision") is None:
  if importlib.util.find_spec("transformers") is not None:
    import transformers  # noqa: F401  before the stand-in, which it would take for the real thing
  _stand_in_for_torchvision()


@pytest.fixture(autouse=True)
def seeded():
  """torch draws the same weights in every session, whichever tests ran before.

  For some draws the logits are all but zero, or the float32 gradient (of ConvMixer-768/32 PyTorch's own too, 3e-3).
  """
  import torch

  torch.manual_seed(0)


@pytest.fixture
def timm():
  return pytest.importorskip("timm")
