"""Sequencer2D with timm's weights gives timm's outputs; VanillaSequencer those of the same thing built of torch.nn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from randomized import randomize

from lra_jax import errors, interop, models

MODELS = functools.partial(models.create, rngs=nnx.Rngs(0))


def relative_error(ours, truth):
  return np.abs(np.asarray(ours) - truth).max() / np.abs(truth).max()


@pytest.mark.filterwarnings("ignore")  # timm's own
@pytest.mark.parametrize(
  "variant,size", [("s", (224, 224)), ("s", (97, 131)), ("m", (70, 70)), ("l", (63, 49)), ("s", (32, 32))]
)
def test_outputs_equal_timms(timm, variant, size):
  theirs = randomize(timm.create_model(f"sequencer2d_{variant}", num_classes=17), std=0.02)
  ours = MODELS(f"sequencer2d_{variant}", input_shape=(*size, 3), num_classes=17)
  interop.load_torch(ours, theirs.state_dict())
  x = torch.randn(1 if max(size) > 100 else 2, 3, *size, generator=torch.Generator().manual_seed(1))
  theirs.stem.img_size = None  # timm refuses other sizes than the one it was made for
  with torch.no_grad():
    truth = theirs(x).numpy()
  assert relative_error(ours(jnp.asarray(x.permute(0, 2, 3, 1).numpy())), truth) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_input_gradients_equal_timms(timm):
  theirs = randomize(timm.create_model("sequencer2d_s", num_classes=5), std=0.02)
  ours = MODELS("sequencer2d_s", input_shape=(56, 56, 3), num_classes=5)
  interop.load_torch(ours, theirs.state_dict())
  theirs.stem.img_size = None
  x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)).requires_grad_()
  (theirs(x) ** 2).sum().backward()
  graphdef, state = nnx.split(ours)
  run = lambda x: (nnx.merge(graphdef, state)(x) ** 2).sum()
  gradient = jax.grad(run)(jnp.asarray(x.detach().permute(0, 2, 3, 1).numpy()))
  assert relative_error(gradient.transpose(0, 3, 1, 2), x.grad.numpy()) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_authors_names_and_safetensors_files_load_too(timm, tmp_path):
  import safetensors.torch

  theirs = timm.create_model("sequencer2d_s", num_classes=3)
  state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
  safetensors.torch.save_file(state, tmp_path / "model.safetensors")
  authors = {}
  depths = (4, 3, 8, 3)
  for name, value in state.items():
    part = name.split(".")
    if part[0] == "stages" and part[2] == "downsample":  # the last element of the stage before
      name = f"blocks.{int(part[1]) - 1}.{depths[int(part[1]) - 1]}.down.{part[-1]}"
    elif part[0] == "stages":
      name = ".".join(["blocks", part[1], *part[3:]])
    authors[name.replace("head.fc", "head")] = value
  assert authors.keys() != state.keys()
  loaded = []
  for weights in (state, tmp_path / "model.safetensors", authors):
    ours = MODELS("sequencer2d_s", input_shape=(42, 42, 3), num_classes=3)
    interop.load_torch(ours, weights)
    assert nnx.state(ours)["stages"][2][7]["lstm"]["w_hh"][...].any()
    loaded.append(nnx.to_pure_dict(nnx.state(ours, nnx.Param)))
  for other in loaded[1:]:
    jax.tree.map(np.testing.assert_array_equal, loaded[0], other)


@pytest.mark.filterwarnings("ignore")
def test_loading_is_strict(timm, tmp_path):
  state = timm.create_model("sequencer2d_s", num_classes=3).state_dict()
  ours = MODELS("sequencer2d_s", input_shape=(42, 42, 3), num_classes=3)
  before = np.asarray(ours.norm.scale[...])
  for broken, message in (
    ({k: v for k, v in state.items() if k != "norm.bias"}, "'norm.bias' is missing"),
    (state | {"extra": torch.ones(1)}, "1 tensors have no place in the model, such as 'extra'"),
    (state | {"norm.bias": torch.ones(7)}, r"'norm.bias' has shape \(7,\)"),
    (state | {"stages.0.blocks.0.rnn_tokens.rnn_v.weight_hh_l0": torch.ones(5, 5)}, "rnn_v.weight_hh_l0"),
  ):
    with pytest.raises(errors.UserError, match=message):
      interop.load_torch(ours, broken)
  np.testing.assert_array_equal(before, ours.norm.scale[...])
  (tmp_path / "x.safetensors").write_bytes(b"not a safetensors file")
  with pytest.raises(errors.UserError, match="cannot be read as safetensors"):
    interop.load_torch(ours, tmp_path / "x.safetensors")


class TorchBlock(torch.nn.Module):
  """The paper's vanilla block of torch.nn pieces, under the authors' names."""

  def __init__(self, dim, hidden):
    super().__init__()
    self.norm1, self.norm2 = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
    self.rnn_tokens = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)})
    self.mlp_channels = torch.nn.ModuleDict(
      {"fc1": torch.nn.Linear(dim, 3 * dim), "fc2": torch.nn.Linear(3 * dim, dim)}
    )

  def forward(self, x):  # B, H, W, C
    tokens = self.norm1(x).flatten(1, 2)
    x = x + self.rnn_tokens["rnn"](tokens)[0].reshape(x.shape)
    mlp = self.mlp_channels
    return x + mlp["fc2"](torch.nn.functional.gelu(mlp["fc1"](self.norm2(x))))


def torch_vanilla(depths, patches, dims, hiddens, grid):
  """Names as in the authors' repository: blocks.STAGE.INDEX, the next stage's downsampling last."""
  model = torch.nn.ModuleDict()
  model["stem"] = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, dims[0], patches[0], patches[0])})
  stages = []
  for i, depth in enumerate(depths):
    parts = [TorchBlock(dims[i], hiddens[i]) for _ in range(depth)]
    if i + 1 < len(depths):
      down = torch.nn.Conv2d(dims[i], dims[i + 1], patches[i + 1], patches[i + 1])
      parts.append(torch.nn.ModuleDict({"down": down}))
    stages.append(torch.nn.ModuleList(parts))
  model["blocks"] = torch.nn.ModuleList(stages)
  model["norm"] = torch.nn.LayerNorm(dims[-1], eps=1e-6)
  model["head"] = torch.nn.Linear(dims[-1], 6)
  if grid:
    model.register_parameter("absolute_pos_embed", torch.nn.Parameter(torch.randn(1, *grid, dims[0])))

  def forward(x):
    x = model["stem"]["proj"](x).permute(0, 2, 3, 1)
    x = x + (model.absolute_pos_embed if grid else 0)
    for part in (part for stage in model["blocks"] for part in stage):
      x = part(x) if isinstance(part, TorchBlock) else part["down"](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return model["head"](model["norm"](x).mean((1, 2)))

  return model, forward


@pytest.mark.parametrize(
  "name,patches,dims,hiddens,grid",
  [
    ("s", (14, 1, 1, 1), (384,) * 4, (192,) * 4, None),
    ("s_h", (7, 2, 1, 1), (192, 384, 384, 384), (96, 192, 192, 192), None),
    ("s_pe", (14, 1, 1, 1), (384,) * 4, (192,) * 4, (4, 5)),
  ],
)
def test_vanilla_sequencer_equals_torch_nn(name, patches, dims, hiddens, grid):
  theirs, forward = torch_vanilla((4, 3, 8, 3), patches, dims, hiddens, grid)
  ours = MODELS(f"vanilla_sequencer_{name}", input_shape=(60, 70, 3), num_classes=6)
  interop.load_torch(ours, theirs.state_dict())
  x = torch.randn(2, 3, 60, 70)
  with torch.no_grad():
    truth = forward(x).numpy()
  assert relative_error(ours(jnp.asarray(x.permute(0, 2, 3, 1).numpy())), truth) < 1e-5
