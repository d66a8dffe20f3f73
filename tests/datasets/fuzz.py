"""Damaged copies of a file, for parsers that must refuse what they cannot read and never do worse."""

import random
import time
from collections.abc import Iterator

SECONDS = 2.0  # for one parser


def damaged(content: bytes, *, seconds: float = SECONDS) -> Iterator[bytes]:
    """Copies of a file with bytes changed, cut off, repeated or put in, for a bounded time; the same ones in every run."""
    rng, end = random.Random(0), time.monotonic() + seconds
    while time.monotonic() < end:
        copy = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(copy) + 1)
            match rng.randrange(5):
                case 0:
                    copy[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))])
                case 1:
                    copy[at:] = b""
                case 2:
                    copy[at:at] = copy[at : at + rng.randint(1, 64)]
                case 3:
                    copy[at:at] = rng.randbytes(rng.randint(1, 8))
                case 4:
                    word = rng.choice((0, 1, 2**15, 2**16 - 1)).to_bytes(2, "little")
                    copy[at : at + rng.choice((2, 4))] = word * rng.choice((1, 2))
        yield bytes(copy)
