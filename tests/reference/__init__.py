"""Slow, obvious re-statements of the papers, to which the real code is held."""
