"""Tests against the real thing: buildah, skopeo and a registry."""
