"""A run from an S3 server that is away for 20 seconds, against the same run from the disk.

    PYTHONPATH=tests python -m helpers.s3_interrupted [SECONDS]

Needs `pip install 'moto[server]' s3fs`.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from threading import Timer
from typing import Any

from helpers.collections_of_images import write_shards
from helpers.run_folders import assert_same, newest
from helpers.tiny import tiny_config
from poa.data.storage import remote
from poa.train import pretrain

STOPPED_AT = 2  # steps


def main(away: float, folder: Path) -> None:
    """Train both runs; raise AssertionError where they differ."""
    from moto.server import ThreadedMotoServer  # optional

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= settings(port) | {"XDG_CACHE_HOME": str(folder / "cache"), "POA_CACHE_GB": "0.00001"}
    remote.BLOCK, remote.SWEEP_EVERY = 1000, 1  # so that every epoch asks the server again
    root, server = write_shards(folder / "data", 24), ThreadedMotoServer("127.0.0.1", port)
    server.start()
    upload(root)
    left: list[float] = []

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == STOPPED_AT and not left:
            server.stop()
            left.append(time.perf_counter())
            Timer(
                away, ThreadedMotoServer("127.0.0.1", port).start
            ).start()  # its objects live in this process

    for source, out, callbacks in ((str(root), "disk", []), ("s3://images", "there", [stop])):
        config = tiny_config(f"data.source={source}", "performance.workers=0")
        pretrain(config, folder / out, callbacks=callbacks)
    waited = time.perf_counter() - left[0]
    assert waited > away, f"expected the run to wait for the server, it took {waited:.1f} s"
    disk, there = (newest(folder / out) for out in ("disk", "there"))
    del disk["config"], there["config"]
    assert_same(disk, there)
    print(
        f"the server was away for {away:g} s after step {STOPPED_AT}; the run is bitwise that from the disk"
    )


def settings(port: int) -> dict[str, str]:
    """The environment in which s3fs asks a server of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def upload(root: Path) -> None:
    """All shards, into a new bucket."""
    import s3fs  # optional

    store = s3fs.S3FileSystem()
    store.mkdir("images")
    for file in sorted(root.iterdir()):
        store.put(str(file), f"images/{file.name}")


if __name__ == "__main__":
    code = 1
    with tempfile.TemporaryDirectory() as scratch:
        try:
            main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0, Path(scratch))
            code = 0
        except Exception:
            traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # the server's threads wait for ever
