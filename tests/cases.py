"""Which of many like cases the default suite has."""

import pytest


def some(values, kept) -> list:
  """`values` to parametrize by; those that are not among `kept` are long."""
  return [pytest.param(x, marks=() if x in kept else pytest.mark.long) for x in values]
