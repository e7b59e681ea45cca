"""A rehearsal of the CentOS path: look-alike of its base image and repositories. See docs/rehearsal.md."""
