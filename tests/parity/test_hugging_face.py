"""Nyströmformer and FNet with weights of Hugging Face transformers: outputs, gradients, and the way back.

transformers' Nyströmformer wants a length that the landmarks divide and draws the pseudo-inverse's start from the
batch or from each matrix; both are compared. Its inputs are integers, so gradients are those of the word embeddings.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from randomized import randomize

from kernels.nystrom_attention import nystrom_attention
from lra_jax import interop, models

transformers = pytest.importorskip("transformers")


def compare(ours, module, vocab, batch, length):
  tokens = torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(1))
  truth = module(input_ids=tokens).logits
  (truth**2).sum().backward()
  embedding = module.base_model.embeddings.word_embeddings.weight.grad.numpy()
  graphdef, params = nnx.split(ours)

  def run(params):
    logits = nnx.merge(graphdef, params)(jnp.asarray(tokens.numpy()))
    return (logits**2).sum(), logits

  (_, logits), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
  truth = truth.detach().numpy()
  assert np.abs(truth).max() > 0.05 and logits.shape == truth.shape
  assert np.abs(np.asarray(logits) - truth).max() < 1e-5 * np.abs(truth).max()
  slope = np.array(gradient["tokenizer"]["embed"]["embedding"][...])
  pad = module.config.pad_token_id
  assert not embedding[pad].any()
  slope[pad] = 0  # where torch keeps the gradient at zero
  assert np.abs(slope - embedding).max() < 1e-4 * np.abs(embedding).max()


def round_trip(ours, module):
  state = {k: v for k, v in module.state_dict().items() if not k.endswith(("position_ids", "token_type_ids"))}
  back = interop.save_torch(ours)
  assert back.keys() == state.keys()
  assert all(np.array_equal(back[k], state[k].numpy()) for k in state)


NYSTROM = dict(vocab_size=50, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=80)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  "batch,length,landmarks,init,kernel",
  [(3, 64, 8, "per_matrix", 9), (2, 60, 12, "global", 5), (1, 32, 32, "per_matrix", 3), (1, 21, 7, "global", 35)],
)
def test_nystromformer(batch, length, landmarks, init, kernel):
  config = transformers.NystromformerConfig(
    **NYSTROM, num_landmarks=landmarks, segment_means_seq_len=length, max_position_embeddings=length, num_labels=6,
    conv_kernel_size=kernel,
  )  # fmt: skip
  module = randomize(transformers.NystromformerForSequenceClassification(config))
  if init == "global":  # transformers' configuration cannot say so
    for layer in module.nystromformer.encoder.layer:
      layer.attention.self.init_option = "original"
  ours = models.create(
    "nystromformer_bert", input_shape=(length,), vocab_size=50, num_classes=6, width=48, depth=3, heads=3,
    mlp_hidden=80, landmarks=landmarks, pinv_init=init, skip_kernel=kernel, rngs=nnx.Rngs(0),
  )  # fmt: skip
  interop.load_torch(ours, module.state_dict())
  compare(ours, module, 50, batch, length)
  round_trip(ours, module)


@pytest.mark.filterwarnings("ignore")
def test_padded_keys_of_exact_attention():
  """With as many landmarks as tokens transformers adds the mask to the scores, as we do."""
  config = transformers.NystromformerConfig(**NYSTROM, num_landmarks=32, segment_means_seq_len=32, conv_kernel_size=5)
  attention = transformers.models.nystromformer.modeling_nystromformer.NystromformerSelfAttention
  module = randomize(attention(config))
  x = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(2))
  mask = (torch.arange(32) < torch.tensor([[32], [21]])).float()
  x = x * mask[..., None]
  with torch.no_grad():
    truth = module(x, attention_mask=(-1e9 * (1 - mask))[:, None, None])[0].numpy()
    q, k, v = (layer(x).reshape(2, 32, 3, 16).numpy() for layer in (module.query, module.key, module.value))
  ours = nystrom_attention(q, k, v, landmarks=32, mask_BL=jnp.asarray(mask.numpy()))
  ours = np.asarray(ours) + skip_of(v, module.conv.weight.detach().numpy()[:, 0, :, 0])
  kept = mask.numpy().astype(bool)
  assert np.abs(ours.reshape(2, 32, 48) - truth)[kept].max() < 1e-5 * np.abs(truth).max()


def skip_of(v_BLNK, filters_NR):
  """transformers convolves padded values too; ours does not, so the test adds its own, in NumPy."""
  pad = filters_NR.shape[1] // 2
  padded = np.pad(v_BLNK, ((0, 0), (pad, pad), (0, 0), (0, 0)))
  length = v_BLNK.shape[1]
  return sum(padded[:, r : r + length] * filters_NR[:, r].reshape(1, 1, -1, 1) for r in range(filters_NR.shape[1]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch,length,width", [(3, 32, 48), (1, 27, 36), (2, 128, 128)])
def test_fnet(batch, length, width):
  config = transformers.FNetConfig(
    vocab_size=50,
    hidden_size=width,
    num_hidden_layers=4,
    intermediate_size=80,
    max_position_embeddings=length,
    num_labels=6,
  )
  module = randomize(transformers.FNetForSequenceClassification(config))
  ours = models.create(
    "fnet_base",
    input_shape=(length,),
    vocab_size=50,
    num_classes=6,
    width=width,
    depth=4,
    mlp_hidden=80,
    rngs=nnx.Rngs(0),
  )
  interop.load_torch(ours, module.state_dict())
  compare(ours, module, 50, batch, length)
  round_trip(ours, module)
