"""The contracts of plugins, for authors to run in their own tests; they need torch and this library, no test runner.

A check returns nothing when its contract is kept and raises :class:`ContractError` with the case and the figures when not.
"""

from __future__ import annotations

from argus.testing.backends import check_backend
from argus.testing.base import ContractError
from argus.testing.policies import check_aging, check_anchors, check_outliers
from argus.testing.tiers import check_tier

__all__ = ["ContractError", "check_aging", "check_anchors", "check_backend", "check_outliers", "check_tier"]
