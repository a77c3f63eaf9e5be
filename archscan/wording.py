"""Put parts of sentences together."""

from collections.abc import Sequence


def enumerated(parts: Sequence[str]) -> str:
    """Write parts as ``a, b and c``; empty where there are none."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
