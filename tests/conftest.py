"""Shared by all tests: --long, in which a skip is a failure."""

import pytest


def pytest_addoption(parser):
  parser.addoption('--long', action='store_true', help='run the long tests; a skip is a failure')


def pytest_collection_modifyitems(config, items):
  if not config.getoption('--long'):
    items[:] = [i for i in items if 'long' not in i.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  report = yield
  if item.config.getoption('--long') and report.skipped:
    report.outcome, report.longrepr = 'failed', f'skipped in --long: {report.longrepr}'
  return report
