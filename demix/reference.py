"""Model references: one syntax wherever a model is named.

`W` is the newest trusted checkpoint of the workdir W, `W@20000` a step, `W#legal` one expert of a
DEMix LM as a dense LM, `W@20000#legal` both. (`forest:F` and `hf:DIR` come with their work.)
"""

import dataclasses
import re
from pathlib import Path

from demix.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Reference:
  """A parsed model reference: step and expert are None where none is named."""
  workdir: Path
  step: int | None = None
  expert: str | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model that was loaded.

  Attributes:
    model: params.Model. params: its running tree. config: the whole Config it was trained with.
    meta: the checkpoint's meta.json. step: which checkpoint. expert: the one taken out, or None.
    workdir: where it lies.
  """
  model: object
  params: dict
  config: object
  meta: dict
  step: int
  expert: str | None
  workdir: Path

  def tokenizer(self, data: str = ''):
    """The tokenizer that the model was trained with: the workdir's copy, or that of a token store.

    Raises:
      BadInput: it is not there, or another.
    """
    from demix.data.tokenizer import Tokenizer, read_meta
    folder = Path(data) / 'tokenizer' if data else self.workdir / 'data' / 'tokenizer'
    if not folder.is_dir() and not data:  # runs before there was a copy
      folder = Path(self.config.data.path) / 'tokenizer'
    had, has = self.meta['tokenizer'], read_meta(folder)[0]['fingerprint']
    if had != has:
      raise BadInput(f'{folder}: tokenizer {has}, but {self.workdir} was trained with {had}: name '
                     'its token store with --data')
    return Tokenizer.load(folder)

  @property
  def domains(self) -> tuple:
    """Training domains, in the order of routes."""
    return self.config.data.domains

  @property
  def members(self):
    """mix.members.ExpertMembers: the experts, or the LM as the only member."""
    from demix.mix.members import ExpertMembers
    return ExpertMembers(self.model, self.expert or 'model')

  @property
  def member_digests(self) -> tuple:
    """Content digest of each member as a whole LM: its own leaves and those it shares."""
    from demix import digests, tree
    shared, own = {}, {}
    for name, leaf in self.meta['leaves'].items():
      if name.startswith('params/'):
        found = tree.EXPERT.fullmatch(name)
        (own.setdefault(found[2], {}) if found else shared)[name] = leaf['digest']
    names = (self.expert,) if self.expert else self.members.names
    return tuple(digests.of_tree(shared | own.get(name, {})) for name in names)


def parse(text: str) -> Reference:
  """'W@20000#legal' → Reference.

  Raises:
    BadInput: not of that form, or a kind of reference that is not built.
  """
  kind = re.match(r'(forest|hf):', text)
  if kind:
    raise BadInput(f'model reference {text!r}: {kind[1]}: references are not built yet; '
                   'name a workdir: W, W@STEP or W#EXPERT')
  found = re.fullmatch(r'(?P<w>[^@#]+)(@(?P<step>\d+))?(#(?P<expert>[A-Za-z0-9_-]+))?', text)
  if not found:
    raise BadInput(f'model reference {text!r} is not W, W@STEP or W#EXPERT')
  step = int(found['step']) if found['step'] else None
  return Reference(Path(found['w']), step, found['expert'])


def locate(text: str) -> tuple[Reference, Path, int]:
  """What a reference names: (reference, W/checkpoints, a step that was verified).

  Raises:
    BadInput: no such workdir or step.
    NothingToLoad: there are checkpoints, but none that can be trusted.
  """
  from demix import catalogue
  ref = parse(text)
  directory = ref.workdir / 'checkpoints'
  if not ref.workdir.is_dir():
    raise BadInput(f'model {text!r}: no such workdir {str(ref.workdir)!r}')
  step = catalogue.latest(directory) if ref.step is None else catalogue.require(
      directory, ref.step)
  if step is None:
    raise BadInput(f'model {text!r}: {directory} holds no finished checkpoint: train it first')
  return ref, directory, step


def load(text: str) -> Loaded:
  """Loads the model that a reference names, verified.

  Raises:
    BadInput: no such workdir, step or expert.
    NothingToLoad: there are checkpoints, but none that can be trusted.
  """
  ref, directory, step = locate(text)

  import jax

  from demix import checkpoint, settings
  from demix.config import Config
  from demix.params import Model, expert_slice
  meta = checkpoint.read_meta(directory, step)
  config = settings.from_dict(Config, meta['config'])
  model = Model(config.model, config.execution, config.train.compute_dtype)
  like = {f'params/{n}': x for n, x in
          jax.eval_shape(model.canonical, model.abstract).items()}
  flat = checkpoint.restore(directory, step, like)
  params = jax.jit(model.running)({n.removeprefix('params/'): x for n, x in flat.items()})
  if ref.expert:
    if config.model.ffn != 'demix':
      raise BadInput(f'model {text!r}: a dense LM has no experts; leave out #{ref.expert}')
    model, params = expert_slice(model, params, ref.expert)
  return Loaded(model, params, config, meta, step, ref.expert, ref.workdir)
