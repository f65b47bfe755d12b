"""A corpus like that of the DEMix paper: its eight training domains over public data sets.

  python -m demix prepare --config=configs/corpora/demix_eight.py --out=W/corpus

Not run here, there is no network: it downloads whole data sets, in the order of 100 GB
(docs/corpora.md has the way to a part of them). Claim: 2108.05036 §2 and its table of domains. The
paper's own texts (S2ORC, Pushshift, a crawl of news) cannot be had under one name any more, so each
domain is the nearest public set, and numbers are not the paper's. All are cut to the same
`max_bytes`, as balanced sampling reads them.
"""

from demix.data.corpus.prepare import PrepareConfig
from demix.settings import to_dict

HELDOUT = 0.005  # of train, for each of valid and test that a data set lacks

CORPUS = (
    {'name': '1b', 'source': 'tfds', 'path': 'lm1b', 'group': 'news', 'heldout': HELDOUT,
     'licence': 'One Billion Word Benchmark: Apache 2.0 (the code); text of WMT 2011 news crawl'},
    {'name': 'cs', 'source': 'tfds', 'path': 'scientific_papers/arxiv', 'text': 'article',
     'group': 'papers', 'licence': 'arXiv: as each author chose (all fields, not CS alone)'},
    {'name': 'legal', 'source': 'huggingface', 'path': 'free-law/Caselaw_Access_Project',
     'heldout': HELDOUT, 'licence': 'CC0 1.0'},
    {'name': 'med', 'source': 'tfds', 'path': 'scientific_papers/pubmed', 'text': 'article',
     'group': 'papers', 'licence': 'PubMed Central open access: as each article says'},
    {'name': 'webtext', 'source': 'huggingface', 'path': 'HuggingFaceFW/fineweb',
     'subset': 'sample-10BT', 'heldout': HELDOUT, 'licence': 'ODC-BY 1.0; Common Crawl terms'},
    {'name': 'realnews', 'source': 'huggingface', 'path': 'allenai/c4', 'subset': 'realnewslike',
     'group': 'news', 'heldout': HELDOUT, 'licence': 'ODC-BY 1.0; Common Crawl terms'},
    {'name': 'reddit', 'source': 'tfds', 'path': 'reddit', 'text': 'normalizedBody',
     'heldout': HELDOUT, 'licence': 'Webis-TLDR-17: CC BY 4.0'},
    {'name': 'reviews', 'source': 'huggingface', 'path': 'fancyzhx/amazon_polarity',
     'text': 'content', 'heldout': HELDOUT, 'licence': 'Apache 2.0 as its card says'},
)


def get_config(arg=''):
  """arg: bytes of train text a domain, 600e6 by default: about 1.1B tokens of 32k ids in all."""
  return to_config(PrepareConfig(
      corpus=CORPUS, domains=tuple(e['name'] for e in CORPUS), vocab_size=32_768,
      sample_bytes=64 << 20, max_bytes=int(float(arg or 600e6)), on_bad_record='skip'))


def to_config(config):
  """A PrepareConfig as a config file returns it."""
  from ml_collections import ConfigDict
  return ConfigDict(to_dict(config))
