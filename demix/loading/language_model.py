"""A Mixture with its tokenizer: what `demix.load` returns, and what people call from Python."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from demix import settings
from demix.config import domain_symbols
from demix.data.clusters.clusterer import Reading
from demix.data.tokens.packing import empty_row
from demix.errors import BadInput
from demix.generation.generate import Writer
from demix.generation.sampling import SamplingConfig
from demix.loading import reference
from demix.mix import prior as priors
from demix.mix.mixture import MixConfig, Mixture, choose, starting_prior

_ROWS = 16  # blocks per forward pass
_SHORTEST = 16  # texts are padded to this or a larger power of two: few programs for all lengths


@dataclasses.dataclass(frozen=True)
class TextScore:
  """A scored text of n tokens.

  Attributes:
    ids: int32 [n]. logp: float32 [n], natural log of each token's probability.
    weights: float32 [experts, n], the weights each token was scored with. experts: their names.
    bytes: of the text.
  """
  ids: np.ndarray
  logp: np.ndarray
  weights: np.ndarray
  experts: tuple
  bytes: int

  @property
  def nll(self) -> float:
    """Nats per token."""
    return -float(self.logp.mean(dtype=np.float64))

  @property
  def perplexity(self) -> float:
    """exp(nats per token)."""
    return math.exp(self.nll)

  @property
  def bits_per_byte(self) -> float:
    """Bits per byte of text."""
    return -float(self.logp.sum(dtype=np.float64)) / math.log(2) / max(1, self.bytes)


@dataclasses.dataclass(frozen=True)
class Generated:
  """A written text.

  Attributes:
    prompt, text: what was given, what was written. ids: of the written tokens.
    ended: why: 'max_tokens', 'end of document', 'stop' or 'context'.
    logp: nats, of the written tokens under the mixture.
    after_prompt: {expert: weight} of all that read the prompt. weights: the mean over the written
      tokens, of those that wrote.
  """
  prompt: str
  text: str
  ids: list
  ended: str
  logp: float
  after_prompt: dict
  weights: dict

  def __str__(self):
    return self.prompt + self.text


def _power(count: int, most: int = 0) -> int:
  """The smallest power of two that is at least `count`; multiples of `most` above that."""
  if most and count > most:
    return -(-count // most) * most
  return 1 << (count - 1).bit_length()


class LanguageModel:
  """A language model: one LM, one expert, or a mixture of experts.

  Args:
    mixture: a Mixture. tokenizer: a data.tokenizer.Tokenizer.
    start: ids that begin every text: end-of-document, behind a <domain> symbol where there is one.
    clusterer: a data.clusterer.Clusterer whose centres are those of the mixture's members, where
      they are its evidence.
  """

  def __init__(self, mixture: Mixture, tokenizer, start=(), clusterer=None):
    self.mixture, self.tokenizer, self.clusterer = mixture, tokenizer, clusterer
    self.start = tuple(start) or (tokenizer.eod_id,)

  @property
  def experts(self) -> tuple:
    """Names of the members that are run."""
    return self.mixture.names

  def __repr__(self):
    return f'LanguageModel({", ".join(self.experts)}; {self.mixture.config.prior} prior)'

  def ids(self, text) -> np.ndarray:
    """int32 ids of a text (str), or the ids that are given, checked."""
    if isinstance(text, str):
      try:
        text.encode()
      except UnicodeEncodeError as e:
        raise BadInput(f'a text with a lone surrogate ({text[e.start]!r} at character {e.start}): '
                       'it is no Unicode text; decode its bytes as UTF-8 first') from None
      return np.asarray(self.tokenizer.encode([text])[0], np.int32)
    ids = np.asarray(text)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
      raise BadInput(f'tokens of shape {ids.shape} and type {ids.dtype}: a text is a str or a '
                     'sequence of ids')
    if len(ids) and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
      raise BadInput(f'ids {ids.min()} to {ids.max()}: the tokenizer has 0 to '
                     f'{self.tokenizer.vocab_size - 1}')
    return ids.astype(np.int32)

  def score(self, texts):
    """Scores every token of a text, or of each of a list of texts.

    A text longer than the context is cut into blocks; the evidence restarts with each, and an
    updating prior moves from block to block of one text.

    Args:
      texts: a str, an array of ids, or a list of those.

    Returns:
      a TextScore, or a list of them.

    Raises:
      BadInput: an empty text, or ids that the tokenizer does not have.
    """
    single = isinstance(texts, (str, np.ndarray)) or (
        len(texts) > 0 and isinstance(texts[0], (int, np.integer)))
    many = [self.ids(t) for t in ([texts] if single else texts)]
    for i, ids in enumerate(many):
      if not len(ids):
        raise BadInput(f'text {i} is empty: nothing to score')
    body = self.mixture.members.context - len(self.start) + 1
    rows, owner = [], []
    for i, ids in enumerate(many):
      for at in range(0, len(ids), body):
        rows.append(self._row(ids, at, body))
        owner.append(i)
    logp, weights = [], []
    moving = self.mixture.config.prior == 'updating'
    if moving:  # from block to block of one text: a text is one batch
      batches = [[r for r, o in zip(rows, owner) if o == i] for i in range(len(many))]
    else:
      batches = [rows[at:at + _ROWS] for at in range(0, len(rows), _ROWS)]
    for batch in batches:
      unit = self.mixture.config.blocks_per_update if moving else 1
      out = self._scored(batch, -(-_power(len(batch), _ROWS) // unit) * unit)
      for row, (lp, w) in zip(batch, out):
        kept = row['weights'][:len(lp)] > 0
        logp.append(lp[kept])
        weights.append(w[:, kept])
    scores = []
    for i, ids in enumerate(many):
      mine = [j for j, o in enumerate(owner) if o == i]
      size = int(self.tokenizer.token_bytes_V[ids].sum())
      scores.append(TextScore(ids, np.concatenate([logp[j] for j in mine]),
                              np.concatenate([weights[j] for j in mine], 1), self.experts, size))
    return scores[0] if single else scores

  def _row(self, ids, at, body) -> dict:
    """One block: what starts a text (or the token before), then ids[at:at + body]."""
    part, lead = ids[at:at + body], len(self.start) - 1
    row = empty_row(self.mixture.members.context)
    whole = np.concatenate([self.start[:-1], self.start[-1:] if at == 0 else ids[at - 1:at], part])
    n = len(whole) - 1
    row['tokens'][:n], row['targets'][:n] = whole[:-1], whole[1:]
    row['weights'][lead:n], row['segments'][:n] = 1, 1
    row['positions'][:n] = np.arange(n)
    return row

  def _scored(self, rows, size):
    """(log p, weights) of the targets of each row; in rows of a length that holds the longest."""
    full = [row['segments'].all() for row in rows] + [False] * (size - len(rows))
    used = max(int(row['segments'].sum()) for row in rows)
    length = min(self.mixture.members.context, max(_SHORTEST, _power(used)))
    rows = [{n: x[:length] for n, x in row.items()} for row in rows]
    rows += [empty_row(length)] * (size - len(rows))
    batch = {f'{n}_BL': np.stack([r[n] for r in rows]) for n in ('tokens', 'targets')}
    if self.clusterer:
      batch['distances_EBL'] = self.clusterer.before_rows(
          self.tokenizer, batch['targets_BL'], self.mixture.config.kernel_tokens)
    out = self.mixture.score(batch, full_B=np.asarray(full))
    logp, weights = np.asarray(out.logp_BL), np.exp(np.asarray(out.log_weights_KBL))
    return [(logp[i], weights[:, i]) for i in range(size)]

  def continuations(self, prompt, options) -> np.ndarray:
    """log p of each option as what follows a prompt, nats, [options].

    The prompt is evidence and is not scored; its beginning is left out where both do not fit.
    Prompt and option are tokenized apart.

    Raises:
      BadInput: an option that is empty or longer than the context.
    """
    before, context, rows = self.ids(prompt), self.mixture.members.context, []
    for option in options:
      ids = self.ids(option)
      room = context - len(self.start) + 1 - len(ids)
      if not len(ids) or room < 0:
        raise BadInput(f'option of {len(ids)} tokens: a context of {context} has room for 1 to '
                       f'{context - len(self.start) + 1}')
      kept = before[max(0, len(before) - room):]
      row = self._row(np.concatenate([kept, ids]), 0, context)
      row['weights'][:len(self.start) - 1 + len(kept)] = 0
      rows.append(row)
    out = []
    for at in range(0, len(rows), _ROWS):
      batch = rows[at:at + _ROWS]
      for row, (logp, _) in zip(batch, self._scored(batch, _power(len(batch), _ROWS))):
        weights = row['weights'][:len(logp)]
        out.append(float((logp.astype(np.float64) * weights).sum()))
    return np.asarray(out)

  def weights(self, text) -> dict:
    """{expert: weight} for the token after a text: what the text says about its domain.

    Only the last tokens that the context has room for are read.
    """
    ids = np.concatenate([self.start, self.ids(text)])[-self.mixture.members.context:]
    return Writer(self.mixture, ids, SamplingConfig(max_tokens=1), self._reading()).after_prompt

  def _reading(self):
    return self.clusterer and Reading(self.clusterer, self.tokenizer,
                                      self.mixture.config.kernel_tokens)

  def generate(self, prompt, *, on_text: Callable | None = None, echo: bool = False,
               **sampling) -> Generated:
    """Writes on from a prompt.

    Args:
      prompt: a str or ids.
      on_text: called with each new piece of text as soon as it is certain.
      echo: on_text gets the prompt first (not before it is known to be good).
      **sampling: fields of sampling.SamplingConfig: max_tokens, temperature, top_k, top_p, seed,
        stop.

    Raises:
      BadInput: an empty prompt, one longer than the context, or an option out of its range.
    """
    stop = sampling.pop('stop', ())  # as it is: a stop string may hold commas and spaces
    sampling = settings.from_dict(SamplingConfig, sampling, 'generate')
    sampling = dataclasses.replace(sampling, stop=(stop,) if isinstance(stop, str) else tuple(stop))
    ids = self.ids(prompt)
    if not len(ids):
      raise BadInput('an empty prompt: give it some text to go on from')
    writer = Writer(self.mixture, np.concatenate([self.start, ids]), sampling, self._reading())
    if echo:
      on_text(prompt)
    # With what comes before: some tokenizers write a text's first token differently.
    before = [int(i) for i in ids[-8:]]
    lead = len(self.tokenizer.decode(before))
    out, text, shown, logp = [], '', 0, 0.0
    total, ended = dict.fromkeys(writer.names, 0.0), 'max_tokens'
    for token in writer:
      if token.id == self.tokenizer.eod_id:
        ended = 'end of document'
        break
      out.append(token.id)
      logp += token.logp
      for name, weight in token.weights.items():
        total[name] += weight
      text = self.tokenizer.decode(before + out)[lead:]
      found = [at for at in (text.find(s) for s in sampling.stop) if at >= 0]
      if found:
        ended, text = 'stop', text[:min(found)]
        break
      # A character may be spread over tokens, and a stop string too.
      certain = len(text.rstrip('\ufffd')) - max(map(len, sampling.stop), default=1) + 1
      if on_text and certain > shown:
        on_text(text[shown:certain])
        shown = certain
    else:
      if len(out) >= writer.room:
        ended = 'context'
    if on_text and len(text) > shown:
      on_text(text[shown:])
    mean = {name: w / max(1, len(out)) for name, w in total.items()}
    return Generated(prompt if isinstance(prompt, str) else self.tokenizer.decode(ids), text, out,
                     ended, logp, writer.after_prompt, mean)


def load(model: str, mix=None, *, prior=None, data: str = '', given: str = '') -> LanguageModel:
  """Loads a language model to score, write and look at.

  Args:
    model: a model reference: 'W', 'W@STEP', 'W#legal'.
    mix: how the experts of a DEMix LM are mixed: a MixConfig, a dict of its fields, or the name of
      a prior ('uniform', 'cached' …). None: uniform prior, prefix posterior.
    prior: weights ({expert: weight}, or a list in the order of the experts), or stored ones:
      'FILE.json:DOMAIN'. Makes the prior fixed or cached.
    data: a token store to take the tokenizer from; by default the run's own.
    given: +DomainToken LMs: whose <domain> symbol starts a text.

  Raises:
    BadInput, NothingToLoad, Refused: see reference.load and mix.prior.
  """
  if isinstance(mix, str):
    mix = {'prior': mix}
  config = mix if isinstance(mix, MixConfig) else settings.from_dict(MixConfig, mix or {}, 'mix')
  return of(reference.load(model), config, prior=prior, data=data, given=given)


def of(loaded: reference.Loaded, config: MixConfig, *, prior=None, data: str = '',
       given: str = '') -> LanguageModel:
  """`load` of what is loaded already."""
  config.check()
  members, log_prior = loaded.members, None
  if isinstance(prior, str):
    file, domain = priors.split_reference(prior)
    names = config.members or members.names
    known = dict(zip(members.names, loaded.member_digests))
    digests = [known.get(n, '') for n in names]
    stored = priors.find(file, names, digests, domain,
                         config.posterior if config.posterior != 'none' else '')
    chosen = stored.log_prior(names, digests)
    whole = dict(zip(names, chosen))
    log_prior = np.asarray([whole.get(n, -np.inf) for n in members.names], np.float32)
    config = dataclasses.replace(config, prior='cached')
  elif prior is not None:
    log_prior = priors.from_weights(prior, members.names)
    config = dataclasses.replace(config, prior='cached')
  # Of a forest only the experts that run are read.
  prior_E = starting_prior(config, members.names, log_prior)
  names = [members.names[i] for i in choose(config, members.names, prior_E)]
  loaded = loaded.take(names)
  if loaded.members.names != members.names:
    kept = [members.names.index(n) for n in loaded.members.names]
    members, log_prior = loaded.members, prior_E[kept]
    log_prior = log_prior - np.logaddexp.reduce(log_prior)
    config = dataclasses.replace(config, members=(), weights={}, prior=(
        'cached' if config.prior == 'fixed' else config.prior))
  tokenizer = loaded.tokenizer(data)
  symbols, start = domain_symbols(loaded.config), ()
  if symbols is not None:
    if given not in loaded.domains:
      raise BadInput(f'{loaded.workdir} has <domain> symbols: name one with given='
                     f'{settings.nearest(given, loaded.domains)}')
    start = (symbols[loaded.domains.index(given)], tokenizer.eod_id)
  elif given:
    raise BadInput(f'given={given}: {loaded.workdir} has no <domain> symbols; name an expert as '
                   f'W#{given}')
  clusterer = loaded.clusterer(config.clusterer) if config.posterior == 'clusters' else None
  return LanguageModel(Mixture(members, loaded.params, config, log_prior), tokenizer, start,
                       clusterer)
