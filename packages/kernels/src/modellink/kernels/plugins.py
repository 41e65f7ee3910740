# SPDX-License-Identifier: Apache-2.0
"""Things that come in kinds, one module each: imports the modules of a package and those of other distributions.

Each module registers itself in a registry of its package when it is imported. Not here: the registries.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from importlib.metadata import entry_points

from modellink.kernels.messages import note


def import_modules(package: str, path: Iterable[str], group: str) -> None:
    """Import all modules of `package`, and all that other distributions name in the entry-point group.

    A module of another distribution that cannot be imported is reported by a note and skipped, so that it does
    not break the others.

    Args:
        package: dotted name of the package.
        path: its `__path__`.
        group: entry-point group, e.g. `modellink.families`.
    """
    for module in pkgutil.iter_modules(path, prefix=package + "."):
        importlib.import_module(module.name)
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            note(f"{entry.name} of {group} ({entry.value}) is not available: {type(error).__name__}: {error}")
