"""demix: language models made of domain experts, in JAX and Flax.

  import demix
  lm = demix.load('W', mix='uniform')
  lm.score('some text').perplexity; lm.weights('some text'); lm.generate('Once').text
"""

from demix import renamed

__version__ = '0.1.0'
__all__ = ['load']


def load(model: str, mix=None, **options):
  """A language model to score, write and look at; see demix.loading.language_model.load."""
  from demix.loading import language_model  # not before it is needed: JAX takes seconds to import
  return language_model.load(model, mix, **options)


renamed.install()
