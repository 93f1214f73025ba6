"""What the sandbox asks of the Linux kernel: namespaces and a small read-only tree, a list of permitted system calls, limits, no privileges.

Standard library only, and no other module of this package: it is loaded by path into an interpreter that knows nothing of llmrl.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, _CLONE_THREAD = 0x20000000, 0x40000000, 0x10000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 2, 0x8000, 1, 2
_SYS_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
NOBODY = 65534
TMP_MEGABYTES = 64

_libc = ctypes.CDLL(None, use_errno=True)


def _check(code: int, what: str) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    kind_, data_ = (None if v is None else v.encode() for v in (kind, data))
    _check(_libc.mount(source.encode(), target.encode(), kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def mount_tmp() -> None:
    """An own, empty /tmp, which ends with the mount namespace."""
    unshare(CLONE_NEWNS)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={TMP_MEGABYTES}m,nr_inodes=4096,mode=1777")
    os.chdir("/tmp")


def enter_namespaces() -> int:
    """Moves this process into a tree with nothing in it but the standard library, shared libraries (both read-only) and an empty /tmp,
    without a network. Returns the user to become (see `drop_privileges`). Raises OSError where the kernel does not let it.
    """
    if os.geteuid() == 0:
        unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        user = 1_000_000_000 + os.getpid()  # nobody else's, so that it owns nothing and shares no count of processes
    else:
        uid, gid = os.geteuid(), os.getegid()
        unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as handle:
                handle.write(text)
        user = NOBODY
    _build_tree()
    return user


def _build_tree() -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    root = "/proc"  # it exists everywhere, and no library lives below it
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for name in ("tmp", "dev"):
        os.mkdir(f"{root}/{name}")
    for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", *sys.path):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path) and not os.path.isdir(root + path):
            os.makedirs(root + path)
            _mount(path, root + path, None, _MS_BIND | _MS_REC)
    for name in ("/dev/null", "/dev/zero", "/dev/urandom"):
        os.close(os.open(root + name, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(name, root + name, None, _MS_BIND)
    os.chdir(root)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount the old root")
    os.chdir("/")
    attributes = struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    code = _libc.syscall(_SYS_MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, attributes, len(attributes))
    _check(code, "mount_setattr")


def drop_privileges(user: int | None) -> None:
    """Becomes `user` (None: stays who it is), with no group and no capability, and never gains any again. Dies with its parent."""
    last_capability = 63
    for capability in range(last_capability + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0 and user is not None:
        os.setgroups([])
        for candidate in (user, NOBODY):
            try:
                os.setresgid(candidate, candidate, candidate)
                os.setresuid(candidate, candidate, candidate)
                break
            except OSError:  # a container maps some 65,536 users only
                continue
    header = struct.pack("Ii", 0x20080522, 0)
    _check(_libc.capset(header, struct.pack("6I", *[0] * 6)), "capset")
    if os.geteuid() == 0:
        raise OSError("still root after giving up privileges")
    _libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)  # after the change of user, which would clear it
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def set_limits(cpu_seconds: int, memory_bytes: int) -> None:
    """CPU time, address space, files of 16 MiB, 64 descriptors, no core dump."""
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 1 << 24),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_MEMLOCK, 0),
    ):  # fmt: skip
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


# Permitted system calls, by number: computing, memory, threads, time, and descriptors that are open already. Not there: starting processes
# and programs, sockets, signals to others, mounts, namespaces, tracing, keys, io_uring, and everything that a later kernel brings.
_COMPUTING = {
    "x86_64": "0 1 3 5 7 8 9 10 11 12 13 14 15 17 18 19 20 22 23 24 25 26 27 28 32 33 34 35 36 37 38 39 44 45 48 55 60 61 63 77 79 96 97"
    " 98 99 100 102 104 107 108 110 111 121 124 128 131 140 143 145 146 147 158 186 201 202 204 213 218 219 228 229 230 231 232 233 247 262"
    " 270 271 273 274 281 283 286 290 291 292 293 318 324 332 334 436 441",
    "aarch64": "17 19 20 21 22 23 24 46 57 59 62 63 64 65 66 67 68 72 73 79 80 85 86 93 94 95 96 98 99 100 101 102 103 113 114 115 120 121"
    " 123 124 125 126 128 132 134 135 137 139 141 153 155 156 160 163 165 169 172 173 174 175 176 177 178 179 206 207 209 210 214 215 216"
    " 222 226 227 232 233 260 278 283 291 293 436 441",
}
# Opening, listing, renaming files and the like: only where the tree is the sandbox's own.
_FILES = {
    "x86_64": "2 4 6 21 40 73 74 75 76 78 80 81 82 83 84 85 86 87 88 89 90 91 95 137 138 217 221 257 258 263 264 265 266 267 268 269 280 285"
    " 316 326 439",
    "aarch64": "32 34 35 36 37 38 43 44 45 47 48 49 50 52 53 56 61 71 78 82 83 88 166 223 276 285 439",
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS = {  # clone, ioctl, socketpair, kill, tgkill, prlimit64, fcntl
    "x86_64": (56, 16, 53, 62, 234, 302, 72), "aarch64": (220, 29, 199, 129, 131, 261, 25),
}  # fmt: skip
_CLONE3, _AF_UNIX = 435, 1
_IOCTLS = [0x5421, 0x5451, 0x541B]  # FIONBIO, FIOCLEX, FIONREAD
_FCNTLS = [0, 1, 2, 3, 4, 5, 6, 7, 1030]  # duplicates, flags, locks; F_SETOWN would send signals to anybody
_STREAMS = [1, 0x801, 0x80001, 0x80801]  # SOCK_STREAM and its flags; a datagram could be sent to any address
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38


def filter_supported() -> bool:
    """Whether `allow_only` knows this machine's system calls, and the kernel filters."""
    if platform.machine() not in _AUDIT or sys.maxsize < 2**32 or sys.byteorder != "little":
        return False
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail") as handle:
            return "errno" in handle.read()
    except OSError:
        return False


def allow_only(files: bool) -> None:
    """From now on this process and its threads can make no system calls but the permitted ones; others fail with EPERM."""
    machine = platform.machine()
    clone, ioctl, socketpair, kill, tgkill, prlimit, fcntl = _NUMBERS[machine]
    me = os.getpid()
    program: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERROR | _EPERM),  # x32 calls have numbers of their own
    ]  # fmt: skip
    for number in sorted(int(n) for n in (_COMPUTING[machine] + (" " + _FILES[machine] if files else "")).split()):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program += [
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERROR | _ENOSYS),
    ]  # its flags can't be seen; clone is tried next
    program += _where(clone, [(0, _ANY_BIT, [_CLONE_THREAD])], _EPERM)
    program += _where(socketpair, [(0, _EQUAL, [_AF_UNIX]), (1, _EQUAL, _STREAMS)], _EPERM)
    program += _where(ioctl, [(1, _EQUAL, _IOCTLS)], _ENOTTY)
    program += _where(fcntl, [(1, _EQUAL, _FCNTLS)], _EPERM)
    for number in (kill, tgkill, prlimit):
        program += _where(number, [(0, _EQUAL, [0, me] if number == prlimit else [me])], _EPERM)
    program.append((_RETURN, 0, 0, _ERROR | _EPERM))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    descriptor = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(descriptor), 0, 0), "seccomp")


def _where(number: int, conditions: list[tuple[int, int, list[int]]], error: int) -> list[tuple[int, int, int, int]]:
    """Allows a call where each named argument (its low 32 bits) passes the test with one of the values, and else refuses it."""
    body: list[tuple[int, int, int, int]] = []
    for argument, test, values in conditions:
        body.append((_LOAD, 0, 0, 16 + 8 * argument))
        body += [(test, len(values) - place, 0, value) for place, value in enumerate(values)]
        body.append((_RETURN, 0, 0, _ERROR | error))
    body.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(body), number), *body]
