"""Weights in other people's formats to ours and back: `python -m convert VERB`."""
