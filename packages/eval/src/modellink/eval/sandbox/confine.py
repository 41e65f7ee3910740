# SPDX-License-Identifier: Apache-2.0
"""The script inside the sandbox: a process drops its privileges and then runs its side of the dialogue.

It is started twice. First it waits for a line on stdin (by then its parent has applied a memory limit), switches to the user
nobody if there are no namespaces and it was root, and executes `unshare` or `bwrap`, which starts this script again in new
namespaces. Under `unshare` it is process 1, mounts a new root folder (system libraries and the interpreter, read only, and an
empty folder of limited size) and leaves the old one; `bwrap` does that by its arguments. Then it sets limits and drops all
privileges.

Only the standard library is imported, because nothing else is visible inside.
"""

# only os, for a short start
# ruff: noqa: PTH100, PTH103, PTH106, PTH112, PTH114, PTH115, PTH119, PTH120, PTH211
from __future__ import annotations

import ctypes
import json
import os
import resource
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import dialogue
from limits import NOBODY, Limits

TYPE_CHECKING = False  # importing typing is slow; type checkers know the name
if TYPE_CHECKING:
    from typing import Any

LIBRARIES = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("null", "zero", "full", "random", "urandom")
FOLDER = "/sandbox"  # the only writable folder
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWUSER = 0x10000000
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 24, 38
SYS = {"x86_64": {"pivot_root": 155, "mount_setattr": 442, "capset": 126},
       "aarch64": {"pivot_root": 41, "mount_setattr": 442, "capset": 91}}
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def syscall(name: str, *args: Any) -> int:
    return int(libc.syscall(ctypes.c_long(SYS[os.uname().machine][name]), *args))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    names = [None if text is None else text.encode() for text in (source, target, kind, options)]
    check(libc.mount(names[0], names[1], names[2], ctypes.c_ulong(flags), names[3]), f"mount {target}")


def bind(source: str, target: str) -> None:
    """Mount a file or folder at another path, read only, with all mounts inside it."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)  # MOUNT_ATTR_RDONLY and _NOSUID have the same values
    recursive = 0x8000
    check(syscall("mount_setattr", -100, target.encode(), recursive, attributes, ctypes.c_size_t(32)), f"read only {target}")


def build_root(limits: Limits, visible: list[str]) -> None:
    """Mount a root folder in memory with only what a Python program needs, and unmount the old one."""
    check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "mount /")
    top = "/tmp"  # any existing folder: it is covered only in this namespace
    kept = {path: os.open(path, os.O_PATH) for path in visible}  # some may be below the covered folder
    mount("sandbox", top, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in (*LIBRARIES, *visible):
        target = top + path
        if os.path.lexists(target) or (path not in kept and not os.path.lexists(path)):
            continue
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        else:
            bind(f"/proc/self/fd/{kept[path]}" if path in kept else path, target)
    for name in DEVICES:
        os.makedirs(top + "/dev", exist_ok=True)
        open(f"{top}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{top}/dev/{name}", None, MS_BIND)
    for name in ("proc", "old", FOLDER.strip("/")):
        os.makedirs(f"{top}/{name}", exist_ok=True)
    mount("proc", top + "/proc", "proc", MS_NOSUID | MS_NODEV)
    mount("folder", top + FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, f"size={limits.folder},mode=777")
    for handle in kept.values():
        os.close(handle)
    os.chdir(top)
    check(syscall("pivot_root", b".", b"old"), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/old", MNT_DETACH), "umount /old")
    os.rmdir("/old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(FOLDER)


def set_limits(limits: Limits) -> None:
    for name, value in (("CORE", 0), ("CPU", limits.cpu_seconds), ("AS", limits.address_space), ("FSIZE", limits.file_size),
                        ("NOFILE", limits.open_files), ("NPROC", limits.processes), ("MEMLOCK", 0), ("MSGQUEUE", 0)):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def drop_privileges() -> None:
    """Drop all capabilities, so that no started program regains any."""
    for number in range(64):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(syscall("capset", header, (ctypes.c_uint32 * 6)()), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def enter(told: dict[str, Any]) -> None:
    """First start with `unshare`, as root or in a new user namespace."""
    sys.stdin.readline()
    if told["isolation"] == "none":
        confine_little(told)
        return
    again = [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)]
    if os.path.basename(told["tool"]) == "bwrap":
        os.execv(told["tool"], [*bubblewrap(told), *again, "settle", json.dumps(told)])
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.execv(told["tool"], ["unshare", *user, "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", *again,
                            "inside", json.dumps(told)])


def bubblewrap(told: dict[str, Any]) -> list[str]:
    """Return the bwrap command for the same namespaces and root folder (bubblewrap 0.8 or newer; see bwrap(1))."""
    words = [told["tool"], "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    if told["root"]:  # which becomes nobody later: process limits do not apply to root, under any name inside
        words += ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--cap-add", "CAP_SETUID", "--cap-add",
                  "CAP_SETGID"]
    else:
        words += ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    for path in dict.fromkeys((*LIBRARIES, *told["visible"])):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.lexists(path) and not any(path.startswith(top + "/") for top in LIBRARIES if not os.path.islink(top)):
            words += ["--ro-bind", path, path]
    for name in DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    size = str(told["limits"]["folder"])
    words += ["--proc", "/proc", "--perms", "1777", "--size", size, "--tmpfs", FOLDER]
    return [*words, "--remount-ro", "/", "--chdir", FOLDER, "--"]


def settle(told: dict[str, Any]) -> None:
    """Second start under bubblewrap, which has done the mounts."""
    if told["root"]:
        become_nobody()
        check(libc.unshare(CLONE_NEWUSER), "user namespace")
    set_limits(Limits(**told["limits"]))
    drop_privileges()


def confine_little(told: dict[str, Any]) -> None:
    """Run without namespaces: only limits, another user if started as root, and a private folder."""
    os.chdir(told["folder"])
    if os.geteuid() == 0:
        os.chown(told["folder"], NOBODY, NOBODY)
        become_nobody()
    set_limits(Limits(**told["limits"]))
    drop_privileges()


def confine(told: dict[str, Any]) -> None:
    """Second start under `unshare`, as process 1 of its namespaces."""
    limits = Limits(**told["limits"])
    root = told["root"]
    os.setsid()
    build_root(limits, told["visible"])
    if root:
        become_nobody()
        check(libc.unshare(CLONE_NEWUSER), "user namespace")
    try:
        with open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")  # in this namespace: no process inside can become root of another one
    except OSError:
        pass  # a kernel without this setting; a nested namespace is limited by this one
    set_limits(limits)
    drop_privileges()


def main() -> None:
    stage, told = sys.argv[1], json.loads(sys.argv[2])
    silent = os.open(os.devnull, os.O_RDWR)
    try:
        if stage == "enter":
            enter(told)
        elif stage == "settle":
            settle(told)
        else:
            confine(told)
    except OSError as error:
        os.write(told["error"], json.dumps({"error": str(error), "verdict": f"failed: {error}"}).encode() + b"\n")
        os._exit(1)
    with open(told["data"], encoding="utf-8") as file:  # closes it: the other side must not inherit other open files
        part = json.load(file)
    for number in range(3):
        os.dup2(silent, number)
    os.close(silent)
    if told["role"] == "judge":  # if both have the same user: no process of that user can access its memory or its handles
        check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "not dumpable")
    dialogue.take_part(told | part)


if __name__ == "__main__":
    main()
