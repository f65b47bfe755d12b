"""Adding an expert to a DEMix LM: the FFNs of a run that started from one of its experts with the
trunk frozen (demix/training/start.py), under a name of their own.

Trunk and old experts stay as they are to the bit; the new checkpoint has the same leaves under the
same names with the same content digests, and the new expert's beside them.
"""

from pathlib import Path

from demix.config import data_fingerprint
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput, Refused
from demix.eval import perplexity
from demix.eval.sequences import Protocol
from demix.lifecycle.workdirs import (
  Saved,
  check_free,
  leaves_of,
  open_demix,
  open_saved,
  with_domains,
  with_entry,
  write,
)
from demix.model.params import Model
from demix.names import why_no_expert
from demix.optim.state import COUNTS
from demix.settings import flatten


def add(model: str, expert: str, source: str, workdir: str, *, require_gain: bool = False,
        data: str = '', limit: int = 0, verify_data: bool = True, say=print):
  """Writes `workdir`: the DEMix LM with one more expert.

  Moments of trunk and old experts are the DEMix LM's, those of the new expert its run's, and so is
  the count of updates that Adam's bias correction uses for it.

  Args:
    model: reference of the DEMix LM. expert: name of the new expert.
    source: reference of the run with its FFNs. workdir: of the new model; must not exist.
    require_gain: write nothing if the gate finds no gain.
    data: token store for the gate; '': the one the run trained on.
    limit: sequences of valid text for the gate; 0: all.
    verify_data: compare that text with the digests in its store's card first.
    say: called with each line for people.

  Raises:
    BadInput: a name, reference or workdir that cannot be.
    Refused: the trunks differ, or there is no gain and `require_gain`.
  """
  before, run, workdir = open_demix(model), open_saved(source, 'from'), Path(workdir)
  check_free(workdir)
  _check_name(before, expert)
  parent = _check_run(before, run)
  _check_trunk(before, run, parent)
  [domain] = run.config.data.domains
  card, theirs = before.card(), run.card()
  store = _open_store(run, data)
  if verify_data:
    store.verify((domain,), ('valid',))
  state, new = before.arrays(), run.arrays()
  gate = measure(before, run, state, new, parent, store, domain, limit)
  say(_gate_line(gate, parent, expert, domain))
  if not (gate and gate['passed']):
    why = 'has no gain over its parent' if gate else 'was not compared with its parent'
    if require_gain:
      raise Refused(f'expert {expert} {why} on valid text of {domain}: nothing was written; train '
                    'it longer or leave out --require_gain')
    say(f'flagged     expert {expert} {why} {parent}')

  names = leaves_of(before.digests(), parent)
  for dense, old in names.items():
    own = old.replace(f'/experts/{parent}/', f'/experts/{expert}/')
    for kind in ('params', 'optimizer/mu', 'optimizer/nu'):
      state[f'{kind}/{own}'] = new[f'{kind}/{dense}']
  for old in before.experts:
    state.setdefault(f'{COUNTS}{old}', state['optimizer/count'])
  state[f'{COUNTS}{expert}'] = new['optimizer/count']
  config = with_domains(before.config, (*before.experts, expert))
  record = {'operation': 'add', 'expert': expert, 'domain': domain, 'parent': parent,
            'model': before.lineage(), 'from': run.lineage(), 'ledger': run.meta['ledger'],
            'gate': gate}
  ledger = {n: before.meta['ledger'][n] + run.meta['ledger'][n] for n in before.meta['ledger']}
  write(workdir, before, state, config, with_entry(card, expert, theirs, domain), record,
        ledger=ledger, epochs=before.meta['epochs'] | {expert: run.meta['epochs'][domain]})
  say(f'added       {expert} to {", ".join(before.experts)}: {workdir}, step {before.step}')
  if config.data.batch_size != before.config.data.batch_size:
    say(f'batch       {before.config.data.batch_size} → {config.data.batch_size} sequences per '
        'update: as many of each domain as before')


def _check_name(before: Saved, expert: str):
  if why := why_no_expert(expert):
    raise BadInput(f'--expert={expert}: not a name for an expert ({why}): give another')
  if expert in before.experts:
    raise BadInput(f'--expert={expert}: {before.workdir} has that expert already '
                   f'({", ".join(before.experts)}): give another name')


def _check_run(before: Saved, run: Saved) -> str:
  """The expert that the run started from; BadInput if it is not a run that makes an expert."""
  init = run.meta.get('init')
  if not init or not init['expert']:
    raise BadInput(f'--from={run.workdir} did not start from an expert: train it with '
                   f'--config.init.model={before.workdir} --config.init.expert=NAME '
                   '--config.init.trainable=ffn')
  if init['expert'] not in before.experts:
    raise BadInput(f'--from={run.workdir} started from expert {init["expert"]!r}, which '
                   f'{before.workdir} does not have ({", ".join(before.experts)})')
  if len(run.config.data.domains) != 1:
    raise BadInput(f'--from={run.workdir} trained on {", ".join(run.config.data.domains)}: an '
                   'expert has one domain')
  if run.meta['tokenizer'] != before.meta['tokenizer']:
    raise BadInput(f'--from={run.workdir} has tokenizer {run.meta["tokenizer"]}, {before.workdir} '
                   f'{before.meta["tokenizer"]}: they must be one')
  return init['expert']


def _check_trunk(before: Saved, run: Saved, parent: str):
  """Refused unless all that experts share is the same to the bit; differences are named."""
  ours, theirs = flatten(before.config.model), flatten(run.config.model)
  skip = ('ffn', 'experts', 'expert_every')
  different = [f'model.{n}: {ours[n]} → {theirs[n]}' for n in ours
               if n not in skip and ours[n] != theirs[n]]
  known, other = before.digests(), run.digests()
  own = leaves_of(known, parent)
  trunk = {n: d for n, d in known.items() if '/experts/' not in n}
  for name in sorted(trunk.keys() | (other.keys() - own.keys())):
    if trunk.get(name) != other.get(name):
      what = 'another value' if name in trunk and name in other else (
          'missing' if name in trunk else 'not in the DEMix LM')
      different.append(f'{name}: {what}')
  different += [f'{n}: missing' for n in own if n not in other]
  if different:
    more = f' (and {len(different) - 6} more)' if len(different) > 6 else ''
    raise Refused(f'the trunk of {run.workdir} is not that of {before.workdir}: '
                  f'{"; ".join(different[:6])}{more}; train it from this model with '
                  '--config.init.trainable=ffn')


def _open_store(run: Saved, data: str) -> TokenStore:
  store = TokenStore.open(data or run.config.data.path)
  [domain] = run.config.data.domains
  if data_fingerprint(store, [domain]) != run.meta['data']:
    raise BadInput(f'{store.path}/{domain} is not the text that {run.workdir} trained on: give its '
                   'store with --data')
  return store


def measure(before: Saved, run: Saved, old: dict, new: dict, parent: str, store: TokenStore,
            domain: str, limit: int) -> dict | None:
  """The gate: NLL of the domain's valid text under the parent expert and under the new one.

  Args:
    before, run: the DEMix LM and the run. old, new: all their leaves.
    limit: sequences; 0: all.

  Returns:
    {'split', 'limit', 'tokens', 'protocol', 'parent_nll', 'nll', 'gain' (nats per token),
    'passed'}; None where the domain has no valid text of which a token is scored.
  """
  if 'valid' not in store.splits(domain):
    return None
  config = run.config
  model = Model(config.model, config.execution, config.train.compute_dtype)
  params = {n.removeprefix('params/'): x for n, x in new.items() if n.startswith('params/')}
  expert = leaves_of(before.digests(), parent)
  protocol, scores = Protocol.of(config.data, limit=limit), []
  for flat in ({n: old[f'params/{expert.get(n, n)}'] for n in params}, params):
    scores += perplexity.evaluate(model, model.running(flat), store,
                                  [perplexity.Part(domain, 'valid')], protocol=protocol)
  if not scores[1].tokens:  # prompts only, in as much of it as was read
    return None
  was, now = (score.mean_nll for score in scores)
  return {'split': 'valid', 'limit': limit, 'tokens': scores[1].tokens, 'protocol': str(protocol),
          'parent_nll': was, 'nll': now, 'gain': was - now, 'passed': now < was}


def _gate_line(gate, parent, expert, domain) -> str:
  if not gate:
    return f'gate        not compared: {domain} has no valid text of which a token is scored'
  return (f'gate        {domain} valid: {gate["parent_nll"]:.4f} nats by {parent}, '
          f'{gate["nll"]:.4f} by {expert} (gain {gate["gain"]:.4f}, {gate["tokens"]} tokens)')
