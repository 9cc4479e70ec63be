"""Serving engines: what makes them read the folders that `slimrank.compress` writes."""
