"""What can happen to a run: signals to it or to parts of it, a full disk, a folder gone, a shard damaged, a page that kills.

A strike is a function of the run, its output folder and a source of chance; it says whether there was something to
strike. Knows nothing of what a fault may cost: `reliability.py` counts.
"""

from __future__ import annotations

import os
import random
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runs import Run, send

Strike = Callable[[Run, Path, random.Random], bool]


def to_driver(number: signal.Signals, times: int = 1) -> Strike:
    """Send the driver a signal, perhaps again shortly after."""

    def strike(run: Run, output: Path, rng: random.Random) -> bool:
        for sent in range(times):
            if not run.going:
                return sent > 0
            run.driver.send_signal(number)
            time.sleep(rng.uniform(0, 0.5) if times > 1 else 0)
        return True

    return strike


def to_group(run: Run, _: Path, rng: random.Random) -> bool:
    """Press Ctrl-C, which a terminal sends to all processes of the group."""
    if run.going:
        os.killpg(run.driver.pid, signal.SIGINT)
    return run.going


def to_one(word: str, number: signal.Signals = signal.SIGKILL) -> Strike:
    """Send a signal to one process whose title has this word."""

    def strike(run: Run, _: Path, rng: random.Random) -> bool:
        found = run.find(word)
        return bool(found) and send(rng.choice(found), number)

    return strike


def to_render_worker(run: Run, _: Path, rng: random.Random) -> bool:
    """Kill the Ray worker that has a sandbox for a child."""
    parents = {member.parent for member in run.find("pipeline.render.worker")}
    found = [member for member in run.members() if member.pid in parents]
    return bool(found) and send(rng.choice(found), signal.SIGKILL)


def to_node(run: Run, _: Path, rng: random.Random) -> bool:
    """Kill everything of the run but its driver, in any order."""
    found = [member for member in run.members() if member.pid != run.driver.pid]
    rng.shuffle(found)
    return sum(send(member, signal.SIGKILL) for member in found) > 0  # all of them, not the first that is there


def fill(run: Run, output: Path, _: random.Random) -> bool:
    """Fill the volume that the output is on."""
    with (output.parent / "filler").open("wb") as file, suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(2**16))
    with (output.parent / "filler").open("ab") as file, suppress(OSError):  # the last page, too
        while True:
            os.write(file.fileno(), b"0")
    return run.going


def empty(output: Path, _: random.Random) -> None:
    (output.parent / "filler").unlink(missing_ok=True)


def remove(run: Run, output: Path, _: random.Random) -> bool:
    """Take the output folder away: renamed, so that it is gone at once."""
    output.rename(output.with_name("removed"))
    return run.going


def damage(how: str) -> Callable[[Path, random.Random], str]:
    """Return what damages one shard of the ledger, and says which."""

    def strike(output: Path, rng: random.Random) -> str:
        file = rng.choice(sorted((output / "requests").glob("*.parquet")))
        whole = bytearray(file.read_bytes())
        if how == "flipped":
            for at in rng.sample(range(len(whole)), 8):
                whole[at] ^= 1 << rng.randrange(8)
        file.write_bytes({"flipped": bytes(whole), "cut": bytes(whole[: len(whole) // 2]), "text": b"shopping list\n", "emptied": b""}[how])
        return file.name

    return strike


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run."""

    strike: Strike
    moment: str
    """`any time`, `answering` (shards appear) or `drawing` (a renderer is there)."""
    codes: Sequence[int]
    """What the run may end with."""
    tries: int = 2
    mend: Callable[[Path, random.Random], str | None] = lambda _, __: None
    """What is done before the run is resumed; may return the name of a shard that it damaged."""
    settings: Sequence[str] = ()
    robs: bool = False
    """It takes answers out of the ledger: that these are asked again is as it should be."""
    retry: bool = False
    """Documents may fail of it: `--retry failed` asks them again."""


FAULTS = {
    "driver killed": Fault(to_driver(signal.SIGKILL), "any time", (-signal.SIGKILL,), 50),
    "driver terminated": Fault(to_driver(signal.SIGTERM), "any time", (143, -signal.SIGTERM)),
    "Ctrl-C": Fault(to_group, "answering", (130,)),
    "Ctrl-C, three times": Fault(to_driver(signal.SIGINT, 3), "answering", (130,)),
    "render worker killed": Fault(to_render_worker, "drawing", (0, 1), retry=True),
    "renderer killed": Fault(to_one("pipeline.render.worker"), "drawing", (0, 1), retry=True),
    "renderer hangs": Fault(to_one("pipeline.render.worker", signal.SIGSTOP), "drawing", (0, 1), 1, retry=True),
    "engine actor killed": Fault(to_one("EngineActor"), "answering", (0, 1)),
    "same, eight at once": Fault(to_one("EngineActor"), "answering", (0, 1), settings=["model.batch_size=8"]),
    "raylet killed": Fault(to_one("raylet/raylet"), "answering", (3,), 1),
    "node killed": Fault(to_node, "answering", (3,), 1),
    "folder removed": Fault(remove, "answering", (3,), 1, robs=True),
    **{
        f"shard {how}": Fault(to_driver(signal.SIGKILL), "answering", (-signal.SIGKILL,), 1, damage(how), robs=True)
        for how in ("flipped", "cut", "text", "emptied")
    },
}
FULL = Fault(fill, "answering", (3,), 2, empty)


# ---- Pages that a renderer cannot bear ----------------------------------------------------------------------------------


def endless_page() -> bytes:
    """Return a PDF of 90 kB whose page begins and drops a path 3,600 million times: minutes of work, and no memory."""
    return document(b"", inflated(b"0 0 m\n", b"1 1 m n\n" * 200_000, 18_000))


def page_of_30_gib() -> bytes:
    """Return a PDF of 67 kB whose page is one path of 3,600 million points, 9 bytes each and more in MuPDF."""
    return document(b"", inflated(b"0 0 m\n", b"1 1 l\n9 8 l\n" * 100_000, 18_000))


def inflated(head: bytes, block: bytes, times: int) -> bytes:
    """Return a stream of a head and a block so many times.

    Deflated twice; the inner stream repeats one block that was flushed, so that gigabytes need not be deflated to make it.
    """
    begin, repeat = zlib.compressobj(9), zlib.compressobj(9, zlib.DEFLATED, -15)
    first = begin.compress(head) + begin.flush(zlib.Z_FULL_FLUSH)
    repeated = repeat.compress(block) + repeat.flush(zlib.Z_FULL_FLUSH)
    return stream(b"/Filter[/FlateDecode/FlateDecode]", zlib.compress(first + repeated * times + b"\3\0", 9))


def stream(head: bytes, content: bytes) -> bytes:
    return b"<<%b/Length %d>>stream\n%b\nendstream" % (head, len(content), content)


def document(page: bytes, *objects: bytes) -> bytes:
    """Return a PDF of one page, whose content is the first of these objects, numbered from 4."""
    kids = b"<</Type/Pages/Kids[3 0 R]/Count 1>>"
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]%b/Contents 4 0 R>>" % page
    text, places = b"%PDF-1.7\n", []
    for number, content in enumerate([b"<</Type/Catalog/Pages 2 0 R>>", kids, page, *objects], 1):
        places.append(b"%010d 00000 n \n" % len(text))
        text += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n%b" % (len(places) + 1, b"".join(places))
    return text + table + b"trailer<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF\n" % (len(places) + 1, len(text))
