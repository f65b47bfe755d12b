"""What a model is and how it is run, as data: read without JAX."""

import dataclasses

from demix.errors import BadInput
from demix.settings import check_values, nearest, option


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What defines the model. Zeros and empty tuples are filled from the data or from other keys."""
  layers: int = option(4, 'N, blocks', low=1)
  d_model: int = option(128, 'D, width of the residual stream', low=1)
  heads: int = option(4, 'H, query heads', low=1)
  kv_heads: int = option(0, 'key and value heads (grouped-query attention); 0: as heads',
                        low=0)
  head_size: int = option(0, 'K, width of a head; 0: d_model / heads', low=0)
  d_ff: int = option(0, 'F, width of the feed-forward layer; 0: 4 · d_model', low=0)
  ffn: str = option('dense', 'dense, or demix: a feed-forward layer per domain',
                    choices=('dense', 'demix'))
  expert_every: int = option(1, 'demix FFN in every layer (1) or every second one (2)',
                             low=1, high=2, needs=('ffn', 'demix'))
  norm: str = option('layernorm', 'layernorm or rmsnorm', choices=('layernorm', 'rmsnorm'))
  norm_placement: str = option('pre', 'pre, or post: the sublayer output is normed (OLMo 2)',
                               choices=('pre', 'post'))
  qk_norm: bool = option(False, 'RMSNorm on each head of q and k')
  positions: str = option('learned', 'learned or rotary', choices=('learned', 'rotary'))
  rope_theta: float = option(10000.0, 'base of the rotary frequencies', above=0,
                             needs=('positions', 'rotary'))
  rope_scale: float = option(1.0, 'rotary positions are divided by this (linear scaling)', above=0,
                             needs=('positions', 'rotary'))
  activation: str = option('gelu', 'gelu (exact), gelu_tanh or swiglu',
                           choices=('gelu', 'gelu_tanh', 'swiglu'))
  biases: bool = option(True, 'biases in every linear layer and LayerNorm')
  tied: bool = option(True, 'the output projection is the embedding table')
  embed_scale: bool = option(True, 'embeddings are multiplied by sqrt(D) at the input')
  init: str = option('fairseq', 'fairseq (as the papers trained) or normal (GPT-2)',
                     choices=('fairseq', 'normal'))
  vocab_multiple: int = option(1, 'the embedding table is padded to a multiple of this', low=1)
  vocab_size: int = option(0, 'V, ids that can be predicted or read; 0: from the data', low=0)
  experts: tuple = option((), "E expert names; (): the run's domains when ffn=demix")
  max_length: int = option(0, 'rows of the learned position table; 0: data.sequence_length',
                           low=0)

  @property
  def head_width(self) -> int:
    return self.head_size or self.d_model // self.heads

  @property
  def ff_width(self) -> int:
    return self.d_ff or 4 * self.d_model

  @property
  def table_rows(self) -> int:
    """Rows of the embedding table: vocab_size, padded."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def period(self) -> int:
    """Blocks after which the kinds of blocks repeat."""
    return self.expert_every if self.ffn == 'demix' else 1

  def check(self):
    """Raises BadInput for a model that cannot be built."""
    check_values(self, 'model.')
    for a, b in (('d_model', 'heads'), ('heads', 'kv_heads'), ('layers', 'period')):
      if getattr(self, a) % (getattr(self, b) or 1):
        raise BadInput(f'model.{a}={getattr(self, a)} is not a multiple of {b}='
                       f'{getattr(self, b)}: change one of them')
    if self.positions == 'rotary' and self.head_width % 2:
      raise BadInput(f'model.head_size={self.head_width} is odd: rotary positions need pairs')


# The papers' four sizes (fairseq transformer_lm_gpt3_*; docs/method.md) and small ones of the
# same form; `llama` has RMSNorm, rotary positions, SwiGLU and no biases.
PRESETS = {
    'tiny': dict(layers=2, d_model=32, heads=2),
    '1m': dict(layers=4, d_model=128, heads=4),
    '10m': dict(layers=12, d_model=256, heads=8),
    '125m': dict(layers=12, d_model=768, heads=12),
    '350m': dict(layers=24, d_model=1024, heads=16),
    '760m': dict(layers=24, d_model=1536, heads=16),
    '1.3b': dict(layers=24, d_model=2048, heads=32),
}
LLAMA = dict(norm='rmsnorm', positions='rotary', activation='swiglu', biases=False,
             embed_scale=False, init='normal')


def preset(name: str, **changes) -> ModelConfig:
  """A named model: 'gpt-125m' (the papers' form) or 'llama-125m', with fields changed."""
  family, _, size = name.partition('-')
  if family not in ('gpt', 'llama') or size not in PRESETS:
    known = [f'{f}-{s}' for f in ('gpt', 'llama') for s in PRESETS]
    raise BadInput(f'model preset {name!r} does not exist{nearest(name, known)}')
  fields = dict(PRESETS[size])
  if family == 'llama':  # two thirds of 4 D, so that three matrices cost what two did
    fields |= LLAMA | dict(d_ff=-(-8 * fields['d_model'] // 3 // 64) * 64)
  return ModelConfig(**(fields | changes))


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """How the model is run; changes speed and memory, not what is computed (up to rounding)."""
  scan: bool = option(True, 'walk the layers with lax.scan; False unrolls them', operational=True)
  remat: str = option('none', 'recompute in the backward pass: none, dots (keep matmul results), '
                      'offload (keep them in host memory) or full', operational=True,
                      choices=('none', 'dots', 'offload', 'full'))
  loss_block: int = option(0, 'tokens per block of the cross-entropy, so that [B, L, V] logits are '
                           'never stored; 0: all at once', operational=True, low=0)
  attention: str = option('auto', 'auto: cudnn on GPUs, splash on TPUs, else plain; or one of them '
                          '(plain where it cannot run, with a message)', operational=True,
                          choices=('auto', 'plain', 'cudnn', 'splash'))

  def check(self):
    """Raises BadInput for values that cannot be."""
    check_values(self, 'execution.')

  def check_devices(self, devices):
    """Raises BadInput when activations shall go to host memory and a device knows none."""
    for device in devices if self.remat == 'offload' else ():
      kinds = [memory.kind for memory in device.addressable_memories()]
      if 'pinned_host' not in kinds:
        raise BadInput(f'execution.remat=offload: {device.device_kind} has memory '
                       f'{", ".join(kinds)} and no pinned_host to move activations to; take '
                       'execution.remat=full or dots')
