"""A DEMix LM whose experts change: reading its checkpoint whole, writing the changed one.

What is written is an ordinary workdir: it is loaded, evaluated and trained on like any other. It
appears under its name complete, or not at all.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orjson

from demix import settings
from demix.checkpoints import checkpoint
from demix.config import Config, digest, identity_of, joint_fingerprint
from demix.data.sampling import schedule
from demix.data.tokens.store import card_fingerprint, domain_fingerprint, read_card
from demix.errors import BadInput
from demix.loading import reference
from demix.model import tree
from demix.runtime.workdir import fsync_directory, save_config, write_atomic

ADDED = ('version', 'leaves', 'content_digest', 'state_digest')  # by checkpoint.Checkpoints


@dataclasses.dataclass(frozen=True)
class Saved:
  """A verified checkpoint, of which nothing but meta.json is read yet."""
  workdir: Path
  step: int
  meta: dict
  config: Config

  @property
  def directory(self) -> Path:
    return self.workdir / 'checkpoints'

  @property
  def experts(self) -> tuple:
    return self.config.model.experts

  def digests(self) -> dict:
    """{name of a parameter, without params/: content digest}."""
    return {n.removeprefix('params/'): leaf['digest'] for n, leaf in self.meta['leaves'].items()
            if n.startswith('params/')}

  def arrays(self) -> dict:
    """{name: np.ndarray} of every leaf, optimizer included, compared with its digest."""
    like = {n: jax.ShapeDtypeStruct(shape, dtype)
            for n, (shape, dtype) in checkpoint.names(self.directory, self.step).items()}
    return {n: np.asarray(x)
            for n, x in checkpoint.restore(self.directory, self.step, like).items()}

  def card(self) -> dict:
    """The data card of what it was trained on."""
    return read_card(self.workdir / 'data')

  def lineage(self) -> dict:
    """How lifecycle records name it."""
    return {'workdir': os.path.abspath(self.workdir), 'step': self.step,
            'content_digest': self.meta['content_digest']}


def open_saved(text: str, flag: str) -> Saved:
  """The checkpoint that a reference names. BadInput, NothingToLoad: as reference.locate."""
  ref, directory, step = reference.locate(text)
  if ref.expert:
    raise BadInput(f'--{flag}={text}: names one expert: give the whole model, {ref.workdir}')
  meta = checkpoint.read_meta(directory, step)
  return Saved(ref.workdir, step, meta, settings.from_dict(Config, meta['config']))


def open_demix(text: str) -> Saved:
  """As `open_saved`, of a DEMix LM whose experts may change."""
  saved = open_saved(text, 'model')
  if saved.config.model.ffn != 'demix':
    raise BadInput(f'--model={text} is a dense LM and has no experts: name a DEMix LM')
  if saved.config.data.domain_token:
    raise BadInput(f'--model={text} has a <domain> symbol for each domain in its vocabulary, which '
                   'cannot change: name a model without them')
  return saved


def check_free(workdir: Path):
  """Raises BadInput unless a new workdir can be made there."""
  try:
    taken = any(workdir.iterdir())
  except FileNotFoundError:
    return
  except OSError as e:
    raise BadInput(f'--workdir={workdir}: cannot be a workdir ({e.strerror})') from None
  if taken:
    raise BadInput(f'--workdir={workdir} is not empty, and nothing is overwritten: name a folder '
                   'that does not exist')


def leaves_of(names, expert: str) -> dict:
  """{name of a dense LM's leaf: name of the expert's leaf} for the leaves of one expert."""
  out = {}
  for name in names:
    found = tree.EXPERT.fullmatch(name)
    if found and found[2] == expert:
      out[f'{found[1].removesuffix("/experts")}/{found[3]}'] = name
  return out


def with_domains(config: Config, domains: tuple) -> Config:
  """The config of the same LM with these experts: rows of each in an update stay as many."""
  data = config.data
  rows = data.batch_size
  if data.sampling == 'balanced':
    rows = rows // len(data.domains) * len(domains)
  known = {d: data.weights[d] for d in domains if d in data.weights}
  mean = sum(known.values()) / max(1, len(known))
  weights = {d: known.get(d, mean) for d in domains} if data.weights else {}
  experts = domains if config.model.ffn == 'demix' else ()
  stages = schedule.only(data.schedule, domains)
  return dataclasses.replace(
      config, model=dataclasses.replace(config.model, experts=experts),
      data=dataclasses.replace(data, domains=domains, batch_size=rows, weights=weights,
                               schedule=stages,
                               schedule_kind=data.schedule_kind if stages else 'piecewise'))


def with_entry(card: dict, name: str, other: dict, domain: str) -> dict:
  """A data card with `domain` of another card under `name`, its fingerprint made anew."""
  entry = other['domains'][domain]
  if card['domains'].get(name, {}).get('splits') == entry['splits']:
    return card
  card = card | {'domains': card['domains'] | {name: entry}}
  return card | {'fingerprint': card_fingerprint(card)}


def write(workdir: Path, before: Saved, state: dict, config: Config, card: dict, record: dict,
          **changes):
  """Writes the workdir of the changed model.

  Args:
    workdir: free, see `check_free`. before: the checkpoint it comes from.
    state: {name: array}, all leaves. config: `with_domains`. card: of the data, all domains in it.
    record: appended to meta.json's `lifecycle`. changes: further keys of meta.json.

  Raises:
    BadInput: the workdir cannot be made, or is no longer free.
    DemixError: the checkpoint could not be saved.
  """
  domains = config.data.domains
  data = joint_fingerprint([domain_fingerprint(card, d) for d in domains])
  init = {n: x for n, x in before.meta['identity'].items()
          if n in ('init.step', 'init.content_digest')}
  identity = identity_of(config, data=data, tokenizer=before.meta['tokenizer'], init=init)
  meta = {n: x for n, x in before.meta.items() if n not in ADDED}
  meta |= {'config': settings.to_dict(config), 'identity': identity,
           'config_digest': digest(identity), 'domains': list(domains), 'data': data,
           'lifecycle': [*meta.get('lifecycle', []), record], **changes}
  lineage = {n: meta[n] for n in ('init', 'lifecycle', 'schedules') if n in meta}
  making = workdir.absolute().parent / f'.{workdir.name}.making-{os.getpid()}'
  try:
    making.mkdir(parents=True)
    with checkpoint.Checkpoints(making / 'checkpoints', max_to_keep=0) as saver:
      saver.save(before.step, state, meta)
    save_config(making, {'version': 1, 'config': meta['config'], 'identity': identity, **lineage})
    (making / 'data').mkdir()
    if (tokenizer := before.workdir / 'data' / 'tokenizer').is_dir():
      shutil.copytree(tokenizer, making / 'data' / 'tokenizer')
    write_atomic(making / 'data' / 'card.json', orjson.dumps(card, option=orjson.OPT_INDENT_2))
    os.rename(making, workdir)  # refused where something has come to lie there
    fsync_directory(making.parent)
  except OSError as e:
    raise BadInput(f'--workdir={workdir}: cannot be made ({e.strerror}); name another') from None
  finally:
    shutil.rmtree(making, ignore_errors=True)
