"""What a run starts from: fresh parameters, or a model that was trained before (config.InitConfig).

An expert of a DEMix LM is taken out as a dense LM; with `trainable=ffn` its trunk is frozen, which
is the papers' DEMix-DAPT: what comes out can be added to that DEMix LM (demix/lifecycle/add.py).
What was resolved at the first start (step and content digest of the model, the expert) is kept with
the run and is identity: going on estimates nothing again, and from the first checkpoint on the run
does not need the model it started from.
"""

import dataclasses
import math
import os
import sys

from demix import settings
from demix.checkpoints import checkpoint
from demix.config import Config, InitConfig, domains_of
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput, DemixError
from demix.eval.given import find_nearest
from demix.eval.sequences import Protocol
from demix.forest import lineage
from demix.loading import reference
from demix.model.params import expert_slice, upcycled
from demix.model.transformer import ModelConfig
from demix.names import NEAREST
from demix.optim.state import saved_part
from demix.settings import nearest
from demix.training import horizon


@dataclasses.dataclass
class Start:
  """A model that a run starts from.

  Attributes:
    model: its config; of the dense LM where an expert is taken out.
    record: what config.json and meta.json keep as `init`: model (as it was named), workdir, step,
      content_digest (of all its parameters), expert ('' for none), asked, nll, margin, error,
      nearest (eval/nearest.py, where the expert was chosen by it), schedule_steps (of its
      optimizer), ancestors (content digests that the model goes back to), trained_on (domains that
      it and they were trained on); of an optimizer that goes on also updates, and where its
      schedule was laid out anew restart and schedules (horizon.pieces); of a dense LM whose FFN is
      copied, upcycled: the experts.
  """
  model: ModelConfig
  record: dict
  _loaded: object = None

  @property
  def identity(self) -> dict:
    """What it adds to the identity fields of the run."""
    return {f'init.{name}': self.record[name] for name in ('step', 'content_digest')}

  def settle(self, config: Config, store: TokenStore) -> Config:
    """The completed config with the name of the expert, which is estimated if it was not yet."""
    record = self.record
    if record['expert'] == NEAREST:
      whole = self._load()
      [domain] = config.data.domains  # `find` has seen to it
      protocol = dataclasses.replace(Protocol.of(whole.config.data),
                                     length=config.data.sequence_length)
      found = find_nearest(whole, store, domain, protocol,
                           sequences=config.init.limit or 1 << 30)
      if warning := found.warning(domain):
        print(f'warning: init.expert=nearest: {warning}', file=sys.stderr, flush=True)
      self.record = record | {
          'expert': found.expert, 'nearest': found.describe(),
          'nll': dict(zip(found.names, found.nll)), 'margin': _number(found.margin),
          'error': _number(found.error)}
    return dataclasses.replace(config, init=dataclasses.replace(
        config.init, expert=self.record['expert']))

  def parameters(self) -> dict:
    """The running tree that training starts with.

    Raises:
      BadInput: the model is gone, or has other parameters than at the first start.
    """
    whole, self._loaded = self._load(), None
    if self.record['expert']:
      return expert_slice(whole.model, whole.params, self.record['expert'])[1]
    if self.record.get('upcycled'):
      return upcycled(whole.model, whole.params, self.model)
    return whole.params

  def moments(self, like: dict) -> dict:
    """The model's optimizer leaves, for a run that continues it.

    Args:
      like: {name: jax.ShapeDtypeStruct} of all leaves of the run's state.

    Raises:
      BadInput: the model is gone or another, or has no moments of these leaves.
    """
    whole = self._load()
    like = {n: x for n, x in like.items() if n.startswith('optimizer/')}
    like = saved_part(like, whole.meta['leaves'])
    return checkpoint.restore(whole.workdir / 'checkpoints', whole.step, like)

  def describe(self) -> str:
    """One line for people."""
    record = self.record
    expert = f', expert {record["expert"]}' if record['expert'] else ''
    if nll := record.get('nll'):
      ranked = ', '.join(f'{name} {x:.3f}' for name, x in sorted(nll.items(), key=lambda i: i[1]))
      expert += f' (nearest: {record["nearest"]}; NLL {ranked})'
    elif record.get('posterior'):  # estimated by an earlier version, which took the largest
      ranked = sorted(record['posterior'].items(), key=lambda item: -item[1])
      shares = ', '.join(f'{name} {share:.3f}' for name, share in ranked)
      expert += f' (nearest; posterior {shares})'
    return f'{record["model"]}, step {record["step"]}{expert}'

  def _load(self):
    if self._loaded is None:
      record = self.record
      try:
        ref = reference.parse(record['model'])
        ref = reference.locate(ref)[0] if ref.forest else ref
        text = reference.Reference(ref.workdir, record['step'])
        loaded = reference.load(text)
      except DemixError as e:
        raise type(e)(f'init.model, of which this run has no checkpoint of its own yet: {e}') from e
      if loaded.meta['content_digest'] != record['content_digest']:
        raise BadInput(f'init.model={text} has content digest {loaded.meta["content_digest"]}, but '
                       f'this run started from {record["content_digest"]}: restore that one, or '
                       'use another workdir')
      self._loaded = loaded
    return self._loaded


def find(config: Config, store: TokenStore, saved: dict | None, workdir) -> Start | None:
  """The model that config.init names, checked; no arrays are read.

  Args:
    config: as the user gave it. store: the open token store.
    saved: content of the workdir's config.json, when it is a run already. What its first start
      resolved holds as long as the model is named as it was then; under another name (a moved
      workdir) it must have the same content.
    workdir: for messages.

  Returns:
    None for fresh parameters.

  Raises:
    BadInput: no such model or expert, another tokenizer, or an `init` that cannot be.
    NothingToLoad: the model has checkpoints, but none that can be trusted.
  """
  init = config.init
  init.check()
  if not init.model:
    return None
  known = (saved or {}).get('init')
  if saved is not None and not known:
    raise BadInput(f'{workdir} belongs to another experiment: it started from fresh parameters, '
                   f'not from init.model={init.model}; use another workdir')
  named = reference.parse(init.model)
  # forest:F#law is a whole LM, forest:F#all/law an expert of a DEMix LM.
  text = (named.expert or '').partition('/')[2] if named.forest else named.expert
  if text and init.expert not in ('', text):
    raise BadInput(f'init.model={init.model} names expert {text!r}, init.expert={init.expert!r}: '
                   'leave one of them out')
  asked = text or init.expert
  if known and init.model == known['model']:
    expert = known['expert'] if asked == NEAREST else asked
    model = settings.from_dict(ModelConfig, saved['config']['model'])
    return Start(model, known | {'expert': expert})
  ref, directory, step = reference.locate(init.model)
  meta = checkpoint.read_meta(directory, step)
  parent = settings.from_dict(Config, meta['config'])
  if known and asked == NEAREST:
    asked = known['expert']
  _check(init, asked, config, parent, meta, store)
  model = parent.model
  if asked:
    model = dataclasses.replace(model, ffn='dense', experts=(), expert_every=1)
  more = {}
  if not asked and model.ffn == 'dense' and config.model.ffn == 'demix':
    domains = domains_of(config.data, store)
    model = dataclasses.replace(model, ffn='demix', experts=domains,
                                expert_every=config.model.expert_every)
    more['upcycled'] = list(domains)
  if init.optimizer == 'continue':
    if more:
      raise BadInput(f'init.optimizer=continue, but the FFN of init.model={init.model} becomes '
                     f'{len(domains)} experts without moments: give init.optimizer=fresh')
    more = {'updates': horizon.updates_of(directory, step, meta)} | horizon.pieces(meta)
  return Start(model, {
      **more, 'model': init.model, 'workdir': os.path.abspath(ref.workdir), 'step': step,
      'content_digest': meta['content_digest'], 'expert': asked, 'asked': asked,
      'schedule_steps': parent.optimizer.schedule_steps,
      'ancestors': sorted(lineage.ancestors(meta)), 'trained_on': lineage.trained_on(meta)})


def _check(init: InitConfig, expert: str, config: Config, parent: Config, meta: dict, store):
  """What must hold before anything is loaded."""
  had, has = meta['tokenizer'], store.tokenizer_meta['fingerprint']
  if had != has:
    raise BadInput(f'init.model={init.model} was trained with tokenizer {had}, {store.path} has '
                   f'{has}: prepare the text with the tokenizer of the model')
  if parent.data.domain_token:
    raise BadInput(f'init.model={init.model} was trained with <domain> symbols, which a run that '
                   'starts from it would not give: start from a model without them')
  if not expert:
    return
  if parent.model.ffn != 'demix':
    raise BadInput(f'init.expert={expert!r}, but init.model={init.model} is a dense LM and has no '
                   'experts: leave init.expert out')
  if expert != NEAREST and expert not in parent.model.experts:
    raise BadInput(f'init.expert={expert!r}: {init.model} has no such expert'
                   f'{nearest(expert, parent.model.experts)}')
  if init.trainable == 'ffn' and parent.model.period > 1:
    raise BadInput(f'init.trainable=ffn of an expert of {init.model}, where expert_every='
                   f'{parent.model.expert_every}: FFNs that all experts share would be trained '
                   'too; give init.trainable=all')
  if expert == NEAREST:
    domains = config.data.domains or tuple(d for d in store.domains if store.roles[d] == 'train')
    if len(domains) != 1:
      raise BadInput(f'init.expert=nearest with {len(domains)} training domains '
                     f'({", ".join(domains)}): it is estimated for one; give one in data.domains, '
                     'or name the expert')
    if domains[0] in store.domains and 'valid' not in store.splits(domains[0]):
      raise BadInput(f'init.expert=nearest: {store.path}/{domains[0]} has no valid text to '
                     'estimate it on; name the expert')


def _number(x: float | None) -> float | None:
  """What JSON has no number for (nothing to compare with) as None."""
  return x if x is not None and math.isfinite(x) else None
