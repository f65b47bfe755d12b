"""README and docs: short where a stranger begins, every link and every named file is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'), ROOT / 'benchmarks/README.md'])


def test_readme_is_read_in_minutes():
  text = (ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_are_there(page):
  text = page.read_text()
  headings = {re.sub(r'[^\w -]', '', h).strip().lower().replace(' ', '-')
              for h in re.findall(r'^#+ (.*)', text, re.M)}
  for link in re.findall(r'\]\(([^)]+)\)', text):
    if link.startswith('http'):
      continue
    file, _, anchor = link.partition('#')
    other = page.parent / file if file else page
    assert other.exists(), f'{page.name}: {link}'
    if anchor:
      found = {re.sub(r'[^\w -]', '', h).strip().lower().replace(' ', '-')
               for h in re.findall(r'^#+ (.*)', other.read_text(), re.M)}
      assert anchor in found, f'{page.name}: {link}'
  assert headings
  for file in re.findall(r'`((?:demix|tests|configs|launch|benchmarks)/[\w/]+\.(?:py|sh))`', text):
    assert (ROOT / file).exists(), f'{page.name}: {file}'
