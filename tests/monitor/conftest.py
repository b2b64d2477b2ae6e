"""What the tests of the monitor share."""

from tests.browser import browser, visit

__all__ = ["browser", "visit"]
