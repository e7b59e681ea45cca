"""Tests of imgbuild: unit, integration, benchmarks."""
