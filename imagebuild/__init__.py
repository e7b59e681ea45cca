"""Composes bootc/OCI images for GPU hosts, in tiers: locked, compiled, checked, published."""
