"""Modules under the names they had before the rooms, for config files and scripts of others.

`from demix.optimizer import OptimizerConfig` still works, and warns with the new place. Nothing in
this project imports by an old name. To be dropped with 0.2.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings

RENAMED = {
    'demix.checkpoint': ['demix.checkpoints.checkpoint'],
    'demix.data.batches': ['demix.data.sampling.data_config', 'demix.data.sampling.batches'],
    'demix.data.importance': ['demix.data.sampling.importance'],
    'demix.data.prepare': ['demix.data.corpus.prepare'],
    'demix.data.store': ['demix.data.tokens.store'],
    'demix.data.tokenizer': ['demix.data.tokens.tokenizer'],
    'demix.generate': ['demix.generation.generate'],
    'demix.optimizer': ['demix.optim.optimizer_config', 'demix.optim.optimizer'],
    'demix.params': ['demix.model.params'],
    'demix.sampling': ['demix.generation.sampling_config', 'demix.generation.sampling'],
    'demix.sharding': ['demix.model.mesh_config', 'demix.model.sharding'],
    'demix.state': ['demix.optim.state'],
    'demix.step': ['demix.optim.step'],
    'demix.sweep': ['demix.fleet.sweep'],
    'demix.transformer': ['demix.model.model_config', 'demix.model.transformer'],
    'demix.tree': ['demix.model.tree'],
}


class _Finder:
  """Asked last by Python, so that names of today cost nothing."""

  def find_spec(self, name, path=None, target=None):
    if name in RENAMED:
      return importlib.machinery.ModuleSpec(name, self, origin=RENAMED[name][0])
    return None

  def create_module(self, spec):
    warnings.warn(f'{spec.name} is now {" and ".join(RENAMED[spec.name])}', DeprecationWarning,
                  stacklevel=2)
    return types.ModuleType(spec.name, f'Now {", ".join(RENAMED[spec.name])}.')

  def exec_module(self, module):
    """What is asked of the module is looked for where it is now, when it is asked."""
    name = module.__name__

    def find(attribute):
      for place in RENAMED[name]:
        found = getattr(importlib.import_module(place), attribute, self)
        if found is not self:
          return found
      raise AttributeError(f'module {name!r} has no attribute {attribute!r}; it is now '
                           + ' and '.join(RENAMED[name]))
    module.__getattr__ = find

  def get_code(self, name):
    """For `python -m`."""
    return importlib.util.find_spec(RENAMED[name][0]).loader.get_code(RENAMED[name][0])


def install():
  """Old names are found from now on."""
  sys.meta_path.append(_Finder())
