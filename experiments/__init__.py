"""Thin mains: flags, then library calls."""
