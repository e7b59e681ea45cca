"""`python -m imagebuild` is `imgbuild`."""

from imagebuild.cli import main

main()
