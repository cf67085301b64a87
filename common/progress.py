"""How far long work has come: a bar on a terminal; elsewhere lines, at most one a minute."""

import sys
import time

from tqdm import tqdm

BETWEEN = 60  # seconds from one line to the next, at least


def bar(description: str, *, total: int | None, unit: str, initial: int = 0, disable: bool = False):
    """Show progress on stderr: as ``tqdm`` does on a terminal, in plain lines elsewhere.

    ::

        with progress.bar("v2", total=len(images), unit="image") as bar:
            for batch in loader:
                bar.update(len(batch))

    Both kinds have tqdm's ``update(n)``, ``set_description(text)``, ``refresh()``, ``close()`` and
    ``set_postfix(values, refresh=False)``. A line comes with ``update`` once a minute, with each
    ``refresh``, and with ``close`` if there is anything new.

    Args:
        total: the number of units; None if it is not known.
        unit: a singular word.
        initial: units that were done before.
        disable: show nothing, as in all processes but one.
    """
    if not sys.stderr.isatty():
        return Lines(description, total, unit, initial, disable)
    shared = {"total": total, "unit": unit, "initial": initial, "disable": disable}
    return tqdm(desc=description, dynamic_ncols=True, **shared)


class Lines:
    """What ``bar`` shows where there is no terminal."""

    def __init__(self, description, total, unit, initial, disable):
        self.description, self.total, self.unit, self.disable = description, total, unit, disable
        self.n = self.initial = self.shown = initial
        self.start = self.last = time.monotonic()
        self.values = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, n=1):
        self.n += n
        if time.monotonic() - self.last >= BETWEEN:
            self.refresh()

    def set_description(self, text):
        self.description = text

    def set_postfix(self, values, refresh=False):
        self.values = values

    def refresh(self):
        self.shown, self.last = self.n, time.monotonic()
        rate = (self.n - self.initial) / max(self.last - self.start, 1e-9)
        parts = [f"{self.n:,}{'' if self.total is None else f'/{self.total:,}'} {self.unit}s"]
        parts += [f"{key} {value}" for key, value in self.values.items()]
        parts.append(f"{rate:.3g} {self.unit}s/s")
        if self.total and rate:
            parts.append(f"{tqdm.format_interval((self.total - self.n) / rate)} left")
        if not self.disable:
            print(f"{self.description}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def close(self):
        if self.n > self.shown:
            self.refresh()
