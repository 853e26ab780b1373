"""Loops of other libraries are right loops: the package has nothing to warn of in them."""

from __future__ import annotations

import pytest

from tests.quiet import beyond_announcements, own_warnings


@pytest.fixture(autouse=True)
def _quiet():
    with own_warnings() as said:
        yield
    unexpected = beyond_announcements(list(dict.fromkeys(said)))
    assert not unexpected, unexpected
