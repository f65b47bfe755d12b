"""Mixtures: members + evidence + gate + combine (docs/method.md). Nothing here reads data."""
