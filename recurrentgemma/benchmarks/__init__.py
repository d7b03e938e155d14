"""Measurements of speed and memory; every one checks correctness before it times."""
