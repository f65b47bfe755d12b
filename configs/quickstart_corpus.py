"""The quick start's corpus: text on this machine, four training domains and a novel one.

  python -m demix prepare --input=local_text --out=W/corpus --config=configs/quickstart_corpus.py
"""

from demix.data.corpus.prepare import PrepareConfig
from demix.settings import to_dict

TRAIN = ('cplusplus', 'science', 'sessions', 'stubs')
NOVEL = ('cython',)
DOMAINS = TRAIN + NOVEL


def get_config(arg=''):
  """No argument."""
  from ml_collections import ConfigDict
  return ConfigDict(to_dict(PrepareConfig(domains=DOMAINS, vocab_size=1024)))
