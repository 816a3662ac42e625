"""The least bytes that any step can move between memory and the processor. README.md has the reasoning."""

from __future__ import annotations

# Bytes per parameter, by family: (float32, bfloat16 with float32 masters and state).
_PLAIN = {"sgd": (20, 20), "adam": (28, 28), "adamw": (28, 28), "lars": (28, 26), "lamb": (40, 40)}
FAMILIES = tuple(_PLAIN)


def bytes_per_parameter(family: str, dtype: str, bookkeeping: str) -> int:
    """The least bytes of a step, per parameter.

    dtype: "float32" or "bfloat16".
    bookkeeping: "plain" or "amp+clip".

    >>> bytes_per_parameter("lamb", "float32", "amp+clip")
    44
    """
    low = dtype == "bfloat16"
    # The global norm comes before any write, so the gradient is read once more. LARS's own norms read it already.
    own_read = bookkeeping == "amp+clip" and family != "lars"
    return _PLAIN[family][low] + own_read * (2 if low else 4)
