"""Benchmarks: side by side in one run, reported as ratios, never asserted."""
