"""ViT, PiT, Mixer, gMLP, ConvMixer and ResNet-18 with timm's weights: outputs, input gradients, and the way back.

Every tensor is random, running statistics of BatchNorm included. Sizes other than the published ones too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from randomized import randomize

from lra_jax import errors, interop, models

# name, timm's constructor and its arguments, size, batch, our overrides, tolerance. Deep stacks of BatchNorm and of 30
# gating units multiply rounding errors of single products; they get 1e-4.
CASES = [
  ("vit_ti16", "vit_tiny_patch16_224", {}, (224, 224), 1, {}, 1e-5),
  ("vit_s16", "vit_small_patch16_224", {"img_size": (48, 80)}, (48, 80), 2, {}, 1e-5),
  ("vit_s32", "vit_small_patch32_224", {"img_size": 64}, (64, 64), 2, {}, 1e-5),
  ("vit_ti16", "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, (32, 32), 2, {"patch_size": 4}, 1e-5),
  ("vit_ti16", "vit_tiny_patch16_224", {"img_size": 33, "global_pool": "avg", "class_token": False, "fc_norm": False},
   (33, 33), 3, {"pool": "mean"}, 1e-5),
  ("pit_ti", "vit_tiny_patch16_224", {"img_size": (9, 7), "patch_size": 1}, (9, 7), 2, {}, 1e-5),
  ("mlp_mixer_s16", "mixer_s16_224", {}, (224, 224), 1, {}, 1e-5),
  ("mlp_mixer_s32", "mixer_s32_224", {"img_size": 96}, (96, 96), 2, {}, 1e-5),
  ("mlp_mixer_b16", "mixer_b16_224", {"img_size": 32}, (32, 32), 3, {}, 1e-5),
  ("gmlp_ti16", "gmlp_ti16_224", {}, (224, 224), 1, {}, 1e-4),
  ("gmlp_s16", "gmlp_s16_224", {"img_size": (64, 48)}, (64, 48), 2, {}, 1e-4),
  ("convmixer_768_32", "convmixer_768_32", {}, (63, 63), 1, {}, 1e-4),
  ("convmixer_1024_20", "convmixer_1024_20_ks9_p14", {}, (70, 56), 2, {}, 1e-4),
  ("resnet18", "resnet18", {}, (224, 224), 1, {}, 1e-5),
  ("resnet18", "resnet18", {}, (57, 71), 3, {}, 1e-5),
]  # fmt: skip


def theirs(timm, constructor, arguments, classes=11):
  return randomize(timm.create_model(constructor, num_classes=classes, **arguments))


def gradient_and_outputs(ours, x):
  """NumPy in PyTorch's layout: the gradient of the sum of the squared logits, and the logits."""
  graphdef, state = nnx.split(ours)

  def run(x_BHWC):
    logits = nnx.merge(graphdef, state)(x_BHWC)
    return (logits**2).sum(), logits

  (_, logits), slope = jax.jit(jax.value_and_grad(run, has_aux=True))(x.detach().permute(0, 2, 3, 1).numpy())
  return np.asarray(slope).transpose(0, 3, 1, 2), np.asarray(logits)


def in_float64(ours):
  """The same model with float64 weights and products, under `jax.enable_x64`."""
  for _, module in nnx.iter_modules(ours):
    if hasattr(module, "dtype"):
      module.dtype = jnp.float64
  graphdef, state = nnx.split(ours)
  return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state))


def compare(ours, module, x, tolerance):
  """Outputs, and gradients of their squares with respect to the input.

  A ReLU whose argument lies within rounding of zero may open in one implementation and not in the other, which moves
  gradients by 3e-3 on some machines: those of models with ReLU are computed in float64.
  """
  slope, logits = gradient_and_outputs(ours, x)
  truth = module(x).detach().numpy()
  assert np.abs(truth).max() > 0.05
  assert np.abs(logits - truth).max() < tolerance * np.abs(truth).max()
  if any(isinstance(layer, torch.nn.ReLU) for layer in module.modules()):
    module, x = module.double(), x.double()
    with jax.enable_x64(True):
      slope, _ = gradient_and_outputs(in_float64(ours), x)
    assert slope.dtype == np.float64
  (gradient,) = torch.autograd.grad((module(x.requires_grad_()) ** 2).sum(), x)
  assert np.abs(slope - gradient.numpy()).max() < 10 * tolerance * gradient.abs().max().item()


@pytest.mark.filterwarnings("ignore")  # timm's own
@pytest.mark.parametrize("name,constructor,arguments,size,batch,overrides,tolerance", CASES)
def test_outputs_and_gradients_equal_timms(timm, name, constructor, arguments, size, batch, overrides, tolerance):
  module = theirs(timm, constructor, arguments)
  ours = models.create(name, input_shape=(*size, 3), num_classes=11, rngs=nnx.Rngs(0), **overrides)
  interop.load_torch(ours, module.state_dict())
  compare(ours, module, torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)), tolerance)


@pytest.mark.filterwarnings("ignore")
def test_convmixer_and_resnet_for_cifar_equal_timms(timm):
  """Both exist in timm only as classes: ConvMixer-256/8 with an even kernel too, ResNet-18 with kuangliu's stem."""
  from timm.models.convmixer import ConvMixer

  x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
  for kernel, patch in ((5, 2), (8, 2)):
    module = randomize(ConvMixer(256, 8, kernel_size=kernel, patch_size=patch, num_classes=11))
    ours = models.create(
      "convmixer_256_8", input_shape=(32, 32, 3), num_classes=11, rngs=nnx.Rngs(0), kernel_size=kernel, patch_size=patch
    )
    interop.load_torch(ours, module.state_dict())
    compare(ours, module, x.clone(), 1e-4)
  module = timm.create_model("resnet18", num_classes=11)
  module.conv1, module.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
  module = randomize(module)
  ours = models.create("resnet18_cifar", input_shape=(32, 32, 3), num_classes=11, rngs=nnx.Rngs(0))
  interop.load_torch(ours, module.state_dict())
  compare(ours, module, x.clone(), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  "name,constructor,size",
  [
    ("sequencer2d_s", "sequencer2d_s", 224),
    ("vit_ti16", "vit_tiny_patch16_224", 224),
    ("mlp_mixer_s32", "mixer_s32_224", 224),
    ("gmlp_ti16", "gmlp_ti16_224", 224),
    ("convmixer_768_32", "convmixer_768_32", 70),
    ("resnet18", "resnet18", 64),
  ],
)
def test_weights_come_back_exactly(timm, tmp_path, name, constructor, size):
  """load_torch, save_torch to a file, and timm reads the file: the same tensors, bit for bit, and strictly."""
  import safetensors.torch

  module = theirs(timm, constructor, {})
  ours = models.create(name, input_shape=(size, size, 3), num_classes=11, rngs=nnx.Rngs(0))
  interop.load_torch(ours, module.state_dict())
  interop.save_torch(ours, tmp_path / "weights.safetensors")
  back = safetensors.torch.load_file(tmp_path / "weights.safetensors")
  state = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
  assert back.keys() == state.keys()
  assert all(torch.equal(back[k], state[k]) for k in state)
  timm.create_model(constructor, num_classes=11).load_state_dict(back, strict=True)


def test_models_without_public_weights_are_refused(tmp_path):
  ours = models.create("trellisnet", input_shape=(64, 3), num_classes=3, rngs=nnx.Rngs(0))
  with pytest.raises(errors.UserError, match="no public PyTorch weights of TrellisNet; there are of ConvMixer, Fnet"):
    interop.load_torch(ours, {})
  tokens = models.create("vit_digits", input_shape=(64,), num_classes=3, vocab_size=9, patch_size=1, rngs=nnx.Rngs(0))
  with pytest.raises(errors.UserError, match="those of an image model"):
    interop.save_torch(tokens)
