"""Temporary."""

from attar.numbers import *  # noqa: F403
