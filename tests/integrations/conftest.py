"""Loops of other libraries are right loops: the package has nothing to warn of in them."""

from __future__ import annotations

import pytest

from tests.quiet import beyond_announcements, own_warnings


@pytest.fixture(autouse=True)
def _quiet(request):
    """A module's ``HINTS`` are patterns of what is rightly said in its loops."""
    with own_warnings() as said:
        yield
    unexpected = beyond_announcements(list(dict.fromkeys(said)), getattr(request.module, "HINTS", ()))
    assert not unexpected, unexpected
