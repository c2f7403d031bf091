"""Engines measured side by side: what is run, how, and how the figures are written down."""
