"""`python -m tests.rehearsal FOLDER`: makes the look-alike and serves it until Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from .commands import RehearsalError
from .look_alike import rehearsal


def main(words: list[str]) -> int:
    """Serve a rehearsal in the folder named by the only argument."""
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: python -m tests.rehearsal FOLDER", file=sys.stderr)
        return 2
    folder = Path(words[0]).absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        with rehearsal(folder, lambda text: print(text, flush=True)) as world:
            print(f"\nThe look-alike of CentOS Stream 10 is there after {time.monotonic() - began:.1f} s.\n")
            print(f"    mirror map: {world.mirror_map}")
            print(f"    imgbuild build --base centos --vendor nvidia --mirror-map {world.mirror_map}\n")
            print("It is served until you press Ctrl-C.", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except RehearsalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
