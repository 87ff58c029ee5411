"""PyTorch models of the same sizes as ours, from the public implementations that ours are checked against."""

from lra_jax import errors
from lra_jax.models import REGISTRY

# Where the small forms of a comparison differ from the presets: transformers has only the BERT form of Nyströmformer.
OVERRIDES = {
  "nystromformer_bert": dict(width=64, depth=2, heads=2, mlp_hidden=128, landmarks=64, skip_kernel=35, dropout=0.0),
  "fnet_base": dict(width=256, depth=4, mlp_hidden=512, dropout=0.0),
}
SMALL_FORMS = (
  "sequencer2d_tiny32",
  "vit_tiny32",
  "mlp_mixer_tiny32",
  "gmlp_tiny32",
  "convmixer_256_8",
  "resnet18_cifar",
  "nystromformer_bert",
  "fnet_base",
)


def reads_tokens(name: str) -> bool:
  """Whether the comparison is made on integer tokens, one a pixel."""
  return name in OVERRIDES


def create(name: str, size: int, channels: int, classes: int):
  """A `torch.nn.Module` of the sizes of our preset `name`.

  Args:
    name: of our model.
    size: height and width of the image; its square is the number of tokens.
    channels: of the image.
    classes: number of logits.

  Returns:
    The module and a function of its output that gives the logits.

  Raises:
    UserError: no public implementation has this model.
  """
  preset = REGISTRY[name][1] | OVERRIDES.get(name, {})
  image = dict(img_size=size, in_chans=channels, num_classes=classes)
  logits = lambda output: output
  if name.startswith("sequencer2d") and len(preset["depths"]) == 4:
    from timm.models.sequencer import Sequencer2d

    module = Sequencer2d(
      **image,
      layers=preset["depths"],
      patch_sizes=preset["patch_sizes"],
      embed_dims=preset["embed_dims"],
      hidden_sizes=preset["hidden_sizes"],
      mlp_ratios=(3.0,) * 4,
    )
  elif name.startswith(("vit", "pit")):
    from timm.models.vision_transformer import VisionTransformer

    token = preset.get("pool", "cls") == "cls"
    module = VisionTransformer(
      **image,
      patch_size=preset["patch_size"],
      embed_dim=preset["width"],
      depth=preset["depth"],
      num_heads=preset["heads"],
      class_token=token,
      global_pool="token" if token else "avg",
      fc_norm=False,
    )
  elif name.startswith(("mlp_mixer", "gmlp")):
    from timm.models import mlp_mixer

    sizes = dict(patch_size=preset["patch_size"], num_blocks=preset["depth"], embed_dim=preset["width"])
    if name.startswith("gmlp"):
      module = mlp_mixer.MlpMixer(
        **image, **sizes, mlp_ratio=6, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=mlp_mixer.GatedMlp
      )
    else:
      ratios = preset["token_hidden"] / preset["width"], preset["channel_hidden"] / preset["width"]
      module = mlp_mixer.MlpMixer(**image, **sizes, mlp_ratio=ratios)
  elif name.startswith("convmixer"):
    from timm.models.convmixer import ConvMixer

    module = ConvMixer(
      preset["width"],
      preset["depth"],
      kernel_size=preset["kernel_size"],
      patch_size=preset["patch_size"],
      in_chans=channels,
      num_classes=classes,
    )
  elif name in ("resnet18", "resnet18_cifar"):
    import timm
    import torch

    module = timm.create_model("resnet18", in_chans=channels, num_classes=classes)
    if name == "resnet18_cifar":
      module.conv1, module.maxpool = torch.nn.Conv2d(channels, 64, 3, 1, 1, bias=False), torch.nn.Identity()
  elif name.startswith(("nystromformer_bert", "fnet_base")):
    import transformers

    common = dict(
      vocab_size=256,
      hidden_size=preset["width"],
      num_hidden_layers=preset["depth"],
      intermediate_size=preset["mlp_hidden"],
      max_position_embeddings=size**2,
      num_labels=classes,
      hidden_dropout_prob=0.0,
    )
    if name.startswith("fnet"):
      module = transformers.FNetForSequenceClassification(transformers.FNetConfig(**common))
    else:
      config = transformers.NystromformerConfig(
        **common,
        num_attention_heads=preset["heads"],
        num_landmarks=preset["landmarks"],
        segment_means_seq_len=size**2,
        conv_kernel_size=preset["skip_kernel"],
        attention_probs_dropout_prob=0.0,
      )
      module = transformers.NystromformerForSequenceClassification(config)
    logits = lambda output: output.logits
  else:
    raise errors.UserError(f"--model {name}: there is no public PyTorch implementation to compare with")
  return module.train(), logits
