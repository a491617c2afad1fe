"""Evaluation: KoBEST as the published tables were made, and bits per byte of any text.

`command.evaluate` is the whole; tasks, data, protocol, metrics, published and report are its parts.
"""
