"""Progress bars: tqdm's, or where it is not installed, none."""

from collections.abc import Iterable, Iterator
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # as on machines that are there for what needs a GPU

    class tqdm:  # type: ignore[no-redef]
        """What this package uses of it."""

        def __init__(self, iterable: Iterable = (), **how: Any) -> None:
            self.iterable = iterable

        def __iter__(self) -> Iterator:
            return iter(self.iterable)

        def __enter__(self) -> "tqdm":
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def update(self) -> None:
            pass

        def set_postfix_str(self, text: str, refresh: bool = True) -> None:
            pass

        @staticmethod
        def write(text: str) -> None:
            print(text, flush=True)


__all__ = ["tqdm"]
