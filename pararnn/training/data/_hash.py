"""Random choices that depend on nothing but a seed and a name."""

import hashlib


def hashed(purpose: str, seed: int, name: str) -> int:
    """64 random bits: the same on every machine, in any version of any library.

    NumPy's generators promise neither; and unlike a draw from them, the bits of one
    name do not depend on which other names there are.
    """
    text = f"{purpose}\0{seed}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
