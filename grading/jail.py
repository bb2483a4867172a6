"""How a process gives up what it may do, for good: limits, capabilities, Landlock and a seccomp filter, through ctypes.

The filter is a list of what a program that only computes needs of Linux. It may start threads but no processes, open
files for reading but not for writing, and has no sockets, no signals to others and no way to run another program.
Landlock narrows reading down to Python's own files. Filters: seccomp(2), <linux/filter.h>; paths: landlock(7).

Standard library alone: this file also runs inside the sandbox.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column of the table below

# Numbers of system calls on x86_64 and aarch64; None: not there. <asm/unistd_64.h>, <asm-generic/unistd.h>.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # Files that are open, memory.
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "fadvise64": (221, 223), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "pipe": (22, None), "pipe2": (293, 59), "eventfd2": (290, 19),
    # Looking at files.
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17),
    # Threads, signals to oneself, time.
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96),
    "rseq": (334, 293), "arch_prctl": (158, None), "membarrier": (324, 283), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "alarm": (37, None), "pause": (34, None), "setitimer": (38, 103),
    "getitimer": (36, 102),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "exit": (60, 93), "exit_group": (231, 94),
    # Knowing oneself.
    "gettid": (186, 178), "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179), "uname": (63, 160), "getrandom": (318, 278),
    "getcpu": (309, 168),
}  # fmt: skip
# These depend on their arguments.
_OPEN, _OPENAT, _FCNTL, _IOCTL = (2, None), (257, 56), (72, 25), (16, 29)
_CLONE, _CLONE3, _PRCTL, _PRLIMIT = (56, 220), (435, 435), (157, 167), (302, 261)
_SOCKETPAIR, _SENDTO, _RECVFROM, _KILL, _WAIT4 = (53, 199), (44, 206), (45, 207), (62, 129), (61, 260)

_WRITING = 0o3 | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # any of these flags of open, O_TMPFILE at the end
_CLONE_THREAD = 0x10000
_AF_UNIX = 1
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # duplicate, get and set flags; not F_SETOWN, which sends signals to others
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451)  # is it a terminal, FIONBIO, FIONREAD, FIO(N)CLEX
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_GET_NAME = 1, 4, 15, 16
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38

# Numbers that Landlock has on every architecture; what it can restrict, by version of its interface.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_NETWORK_RIGHTS, _SCOPE_SOCKETS, _SCOPE_SIGNALS = 0b11, 1, 2


class JailError(Exception):
    """This machine cannot confine a process so; the text says why."""


def end_with_parent() -> None:
    """The kernel ends this process when the thread that started it ends; nobody of the same user may look into it."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(_PR_SET_DUMPABLE, 0)


def limit(memory_mib: int, cpu_seconds: int, processes: int | None = None) -> None:
    """Limits of the kernel for this process. processes: of this user, threads included; None: as before."""
    wanted = {
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        **({} if processes is None else {resource.RLIMIT_NPROC: processes}),
    }
    for kind, value in wanted.items():
        with contextlib.suppress(OSError, ValueError):  # macOS knows limits that it refuses to set
            # The first signal for too much time can be told from others; the one that nobody survives is later.
            resource.setrlimit(kind, (value, value + (kind == resource.RLIMIT_CPU)))


def confine(readable: Sequence[str], child: int | None = None) -> bool:
    """Gives up everything that the module's text says; needs one thread. True: reading is confined to `readable`, too.

    child: of this process, which it may go on killing and waiting for. JailError: there is no seccomp here.
    """
    if sys.platform != "linux" or os.uname().machine not in _ARCHITECTURES:
        raise JailError(f"there is no filter for {sys.platform} on {os.uname().machine}")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # A child that was forked before is outside: signals to it are left to the filter.
    landlocked = _landlock(readable, _SCOPE_SOCKETS | (_SCOPE_SIGNALS if child is None else 0))
    header, nothing = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    _checked(_libc().capset(header, nothing), "capset")
    program = _filter(*_ARCHITECTURES[os.uname().machine], child)
    code = b"".join(program)
    pointer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(pointer))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(fprog))
    return landlocked


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise JailError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, value: int, more: ctypes.c_char_p | int = 0) -> None:
    _checked(_libc().prctl(option, ctypes.c_ulong(value), more, 0, 0), f"prctl {option}")


# ---- Landlock


def _landlock(readable: Sequence[str], scopes: int) -> bool:
    """False: the kernel has no Landlock, and nothing was done."""
    libc = _libc()
    libc.syscall.restype = ctypes.c_long
    version = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    rights = [_FILE_RIGHTS[min(version, 5)]]
    rights += [_NETWORK_RIGHTS] if version >= 4 else []
    rights += [scopes] if version >= 6 else []
    attributes = struct.pack(f"<{len(rights)}Q", *rights)
    size, none = ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
    rules = _checked(libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), attributes, size, none), "landlock_create_ruleset")
    for path in readable:
        with contextlib.suppress(FileNotFoundError):
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            right = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE
            rule = struct.pack("<Qi", right, folder)
            _checked(libc.syscall(ctypes.c_long(_LANDLOCK_ADD), ctypes.c_int(rules), 1, rule, none), f"landlock {path}")
            os.close(folder)
    _checked(libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_int(rules), none), "landlock_restrict_self")
    os.close(rules)
    return True


# ---- The filter: a program of Berkeley Packet Filter over struct seccomp_data

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def _filter(architecture: int, column: int, child: int | None) -> list[bytes]:
    def case(call: tuple[int | None, int | None], *then: bytes) -> list[bytes]:
        """`then`, which returns, for one system call."""
        number = call[column]
        return [] if number is None else [_op(_EQUAL, number, 0, len(then)), *then]

    program = [_load(4), _op(_EQUAL, architecture, 1, 0), _op(_RETURN, _KILL_PROCESS), _load(0)]
    for call in _ALLOWED.values():
        program += case(call, _allow())
    for call, place in ((_OPEN, 1), (_OPENAT, 2)):
        program += case(call, _argument(place), _op(_ANY_BIT, _WRITING, 0, 1), _refuse(errno.EACCES), _allow())
    for call, allowed in ((_FCNTL, _FCNTL_COMMANDS), (_IOCTL, _IOCTL_COMMANDS)):
        program += case(call, _argument(1), *_one_of(allowed))
    program += case(_PRCTL, _argument(0), *_one_of((_PR_SET_NAME, _PR_GET_NAME)))
    program += case(_PRLIMIT, _argument(0), *_one_of((0,)))
    program += case(_CLONE, _argument(0), _op(_ANY_BIT, _CLONE_THREAD, 0, 1), _allow(), _refuse(errno.EPERM))
    program += case(_CLONE3, _refuse(errno.ENOSYS))  # its flags are in memory: the C library then uses clone
    # Pairs of sockets, which asyncio makes, but none that could reach anybody: sendto must not name an address.
    program += case(_SOCKETPAIR, _argument(0), *_one_of((_AF_UNIX,)))
    program += case(_SENDTO, _argument(4), _op(_EQUAL, 0, 0, 3), _argument(4, 4), _op(_EQUAL, 0, 0, 1), _allow(),
                    _refuse(errno.EPERM))  # fmt: skip
    program += case(_RECVFROM, _allow())
    if child is not None:
        program += case(_KILL, _argument(0), *_one_of((child,))) + case(_WAIT4, _allow())
    return [*program, _refuse(errno.EPERM)]


def _op(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("<HBBI", code, then, otherwise, value)


def _load(offset: int) -> bytes:
    return _op(_LOAD, offset)


def _argument(place: int, half: int = 0) -> bytes:
    """Loads the lower (or with half=4 the upper) 32 bits of an argument."""
    return _load(16 + 8 * place + half)


def _allow() -> bytes:
    return _op(_RETURN, _ALLOW)


def _refuse(number: int) -> bytes:
    return _op(_RETURN, _ERROR | number)


def _one_of(values: Sequence[int]) -> list[bytes]:
    """Allows what was loaded if it is one of `values`."""
    return [op for value in values for op in (_op(_EQUAL, value, 0, 1), _allow())] + [_refuse(errno.EPERM)]
