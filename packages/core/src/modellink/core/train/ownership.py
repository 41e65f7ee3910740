# SPDX-License-Identifier: Apache-2.0
"""One run per --save folder: rank 0 holds an owner file in it, and a run that lost its folder writes nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.owner import owner_file, take, token_of

_tokens: dict[Path, str] = {}
"""The folders that runs of this process save in, with the token of each owner; also after the rank that held it is gone."""


class LostFolder(ModelLinkError):
    """The run must not write to its folder any more."""


@contextmanager
def own(folder: Path | None) -> Iterator[None]:
    """Be the only run that saves in `folder`; all ranks call it.

    Raises:
        ModelLinkError: another run saves there, or the folder cannot be written; on all ranks.
    """
    if folder is None:
        yield
        return
    with ExitStack() as stack:
        def start() -> str:
            owner = take(owner_file(folder, inside=True))
            stack.callback(owner.release)
            return owner.token

        _tokens[folder] = _on_first(start, ModelLinkError)
        try:
            yield
        finally:
            del _tokens[folder]


@contextmanager
def inherited(folder: Path | None) -> Iterator[None]:
    """Own `folder` in place of a rank 0 that has failed; all ranks that are left call it.

    The file may still be there, be removed by the rank that ends, or be removed in this moment.

    Raises:
        LostFolder: another run saves there; on all ranks.
    """
    if folder is None or folder not in _tokens:
        yield
        return
    with ExitStack() as stack:
        def start() -> str:
            path = owner_file(folder, inside=True)
            if token_of(path) not in (None, _tokens[folder]):
                raise _taken_over(path)
            owner = take(path, wait=True, after=_tokens[folder])
            stack.callback(owner.release)
            return owner.token

        _tokens[folder] = _on_first(start, LostFolder)
        yield


def check(folder: Path) -> None:
    """Raise LostFolder on all ranks unless this run still owns `folder`; all ranks call it."""
    if folder not in _tokens:
        return

    def compare() -> str:
        path = owner_file(folder, inside=True)
        if (found := token_of(path)) == _tokens[folder]:
            return found
        raise _taken_over(path) if found else _lost("the owner file of this run was removed from --save", path)

    _on_first(compare, LostFolder)


def _taken_over(path: Path) -> LostFolder:
    return _lost("another run has taken over --save", path)


def _lost(what: str, path: Path) -> LostFolder:
    return LostFolder(f"{what}: this run saves nothing more and ends", where=path,
                      fix="let only one run save in a folder; resume from the last complete checkpoint")


def _on_first(work: Callable[[], str], kind: type[ModelLinkError]) -> str:
    """The result of `work` on rank 0; its error is raised on all ranks."""
    shared: list[tuple[str, str, str | None] | str] = [""]
    if dist.get_rank() == 0:
        try:
            shared = [work()]
        except ModelLinkError as error:
            shared = [(error.what, str(error.where), error.fix)]
    dist.broadcast_object_list(shared)
    if isinstance(shared[0], str):
        return shared[0]
    what, where, fix = shared[0]
    raise kind(what, where=where, fix=fix)
