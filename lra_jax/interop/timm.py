"""Names of timm's VisionTransformer, MlpMixer (Mixer and gMLP), ConvMixer and ResNet (torchvision's are the same)."""

from lra_jax import errors
from lra_jax.interop.layout import Entries


def _tokenizer(e: Entries, model, name: str) -> None:
  if model.tokenizer.grid is None:
    raise errors.UserError("the public weights are those of an image model; this one reads sequences or tokens")
  e.conv(("tokenizer", "embed"), name)


def vit(model) -> Entries:
  """Layout of `vit.Vit` with learned positions."""
  e = Entries()
  _tokenizer(e, model, "patch_embed.proj")
  if model.cls is not None:
    e.same(("cls",), "cls_token")
  if model.position is not None:
    e.same(("position",), "pos_embed")
  for i in range(len(model.blocks)):
    path, name = ("blocks", i), f"blocks.{i}"
    e.norm((*path, "norm1"), f"{name}.norm1")
    e.dense((*path, "attention", "qkv"), f"{name}.attn.qkv")
    e.dense((*path, "attention", "out"), f"{name}.attn.proj")
    e.norm((*path, "norm2"), f"{name}.norm2")
    e.dense((*path, "mlp", "fc1"), f"{name}.mlp.fc1")
    e.dense((*path, "mlp", "fc2"), f"{name}.mlp.fc2")
  e.norm(("norm",), "norm")
  e.dense(("head",), "head")
  return e


def mlp_mixer(model) -> Entries:
  """Layout of `mlp_mixer.MlpMixer`."""
  e = Entries()
  _tokenizer(e, model, "stem.proj")
  for i in range(len(model.blocks)):
    path, name = ("blocks", i), f"blocks.{i}"
    e.norm((*path, "norm1"), f"{name}.norm1")
    e.norm((*path, "norm2"), f"{name}.norm2")
    for ours, theirs in (("tokens", "mlp_tokens"), ("channels", "mlp_channels")):
      e.dense((*path, ours, "fc1"), f"{name}.{theirs}.fc1")
      e.dense((*path, ours, "fc2"), f"{name}.{theirs}.fc2")
  e.norm(("norm",), "norm")
  e.dense(("head",), "head")
  return e


def gmlp(model) -> Entries:
  """Layout of `gmlp.Gmlp`."""
  e = Entries()
  _tokenizer(e, model, "stem.proj")
  for i in range(len(model.blocks)):
    path, name = ("blocks", i), f"blocks.{i}"
    e.norm((*path, "norm"), f"{name}.norm")
    e.dense((*path, "fc1"), f"{name}.mlp_channels.fc1")
    e.norm((*path, "gate", "norm"), f"{name}.mlp_channels.gate.norm")
    e.dense((*path, "gate", "project"), f"{name}.mlp_channels.gate.proj")
    e.dense((*path, "fc2"), f"{name}.mlp_channels.fc2")
  e.norm(("norm",), "norm")
  e.dense(("head",), "head")
  return e


def convmixer(model) -> Entries:
  """Layout of `convmixer.ConvMixer`."""
  e = Entries()
  e.conv(("embed",), "stem.0")
  e.batch_norm(("norm",), "stem.2")
  for i in range(len(model.blocks)):
    path, name = ("blocks", i), f"blocks.{i}"
    weight = f"{name}.0.fn.0.weight"  # (channels, 1, rows, columns)
    e.add(
      (*path, "w_depthwise"),
      [weight],
      lambda ts: ts[0][:, 0].transpose(1, 2, 0),
      lambda a: [a.transpose(2, 0, 1)[:, None]],
    )
    e.same((*path, "bias"), f"{name}.0.fn.0.bias")
    e.batch_norm((*path, "norm1"), f"{name}.0.fn.2")
    weight = f"{name}.1.weight"  # (out, in, 1, 1)
    e.add((*path, "pointwise", "kernel"), [weight], lambda ts: ts[0][:, :, 0, 0].T, lambda a: [a.T[:, :, None, None]])
    e.same((*path, "pointwise", "bias"), f"{name}.1.bias")
    e.batch_norm((*path, "norm2"), f"{name}.3")
  e.dense(("head",), "head")
  return e


def resnet(model) -> Entries:
  """Layout of `resnet.ResNet`."""
  e = Entries()
  e.conv(("conv",), "conv1", bias=False)
  e.batch_norm(("norm",), "bn1")
  index = 0
  for stage, depth in enumerate(model.depths):
    for j in range(depth):
      path, name = ("blocks", index), f"layer{stage + 1}.{j}"
      for number in (1, 2):
        e.conv((*path, f"conv{number}"), f"{name}.conv{number}", bias=False)
        e.batch_norm((*path, f"norm{number}"), f"{name}.bn{number}")
      if model.blocks[index].shortcut is not None:
        e.conv((*path, "shortcut"), f"{name}.downsample.0", bias=False)
        e.batch_norm((*path, "shortcut_norm"), f"{name}.downsample.1")
      index += 1
  e.dense(("head",), "fc")
  return e
