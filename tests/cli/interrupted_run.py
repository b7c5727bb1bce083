"""Runs `turbo-opt` with shards of one MiB, and stops after writing the third.

With `--finish` it goes on to the end, and says which shards it had to write.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import turbo_opt.artifact.save as module
from turbo_opt.cli.main import main

_write_shard, _written = module.write_shard, []


def stop_in_the_middle(*arguments):
    """Write a shard; after the third, with two on record, tell the test and wait."""
    digest = _write_shard(*arguments)
    _written.append(arguments)
    if len(_written) == 3:
        while Path(".out.partial.journal").read_text().count("\n") < 2:
            time.sleep(0.01)
        print("MIDDLE", flush=True)
        time.sleep(60)
    return digest


def count(*arguments):
    """Write a shard and say so."""
    print("SHARD", file=sys.stderr)
    return _write_shard(*arguments)


if __name__ == "__main__":
    assert module.save.__kwdefaults__
    module.save.__kwdefaults__["max_shard_bytes"] = 2**20
    finish = "--finish" in sys.argv
    module.write_shard = count if finish else stop_in_the_middle
    sys.argv = [item for item in sys.argv if item != "--finish"]
    main()
