"""`python -m demix prepare`: a corpus into a tokenizer and a token store."""

from pathlib import Path

from demix.errors import BadInput
from demix.verbs.flags import Verb, require

SUMMARY = 'a corpus into a tokenizer and a token store'


def run(argv: list[str]) -> int:
  """Parses flags and prepares a token store."""
  from demix.data.clusters.fit import DiscoverConfig
  from demix.data.corpus import documents
  from demix.data.corpus.prepare import LOCAL_TEXT, PrepareConfig, prepare
  verb = Verb('prepare', SUMMARY)
  verb.string('input', '', f'{documents.LAYOUT}; or {LOCAL_TEXT}: text that lies on this machine; '
              'with config.corpus the folder that relative paths start from')
  verb.string('out', '', 'folder of the token store; replaced only when inputs or config changed')
  verb.config(PrepareConfig, 'FILE[:ARG]')
  verb.config(DiscoverConfig, 'K', 'discover', 'K, or a config file: find K clusters in the '
              'documents, whatever their labels, and make them the domains (c-BTM); --input may be '
              'a token store')
  flags, config = verb.parse(argv)
  input = flags.input if config.corpus else \
      require(flags.input, 'input', f'a folder ({documents.LAYOUT}) or {LOCAL_TEXT}')
  out = require(flags.out, 'out', 'a folder for the token store')
  clusters = _clusters(verb, flags.discover_words)
  if clusters is None:
    prepare(input, out, config)
    return 0
  from demix.data.clusters.discover import discover
  if not (Path(input) / 'card.json').is_file():
    labelled = Path(out).resolve()
    labelled = labelled.with_name(f'{labelled.name}_domains')
    prepare(input, labelled, config)
    input = labelled
    print()
  elif config != PrepareConfig():
    raise BadInput(f'--config with --input={input}: it is a token store, with a tokenizer and '
                   'domains; give the corpus that it was made of')
  discover(input, out, clusters)
  return 0


def _clusters(verb, words: str):
  """The DiscoverConfig that is asked for, or None."""
  import dataclasses

  from demix.data.clusters.fit import DiscoverConfig
  config = verb.configs['discover']
  if not words and config == DiscoverConfig():
    return None
  if words.isdecimal():
    config = dataclasses.replace(config, clusters=int(words))
  elif words not in ('', 'all', 'file'):
    raise BadInput(f'--discover={words}: neither a number of clusters nor a config file')
  config.check()
  return config
