"""The filter of system calls, for processors that this machine does not have as well: read by a small machine."""

import os
import struct
from pathlib import Path

import pytest

from dsv3.grading import jail


def verdict(program: list[bytes], architecture: int, number: int, arguments: tuple[int, ...] = ()) -> str:
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *(0,) * (6 - len(arguments)))
    place = value = 0
    while True:
        code, then, otherwise, k = struct.unpack("<HBBI", program[place])
        place += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, k)
        elif code == 0x15:
            place += then if value == k else otherwise
        elif code == 0x45:
            place += then if value & k else otherwise
        else:
            assert code == 0x06
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(k, os.strerror(k & 0xFFFF))


MACHINES = [(audit, column) for audit, column in jail._ARCHITECTURES.values()]
NO = os.strerror(1)


@pytest.mark.parametrize(("audit", "column"), MACHINES)
def test_the_filter_allows_its_list_and_nothing_else(audit: int, column: int):
    program = jail._filter(audit, column, None)
    assert len(program) < 4096
    allowed = {call[column] for call in jail._ALLOWED.values()} - {None}
    special = {
        jail._OPEN, jail._OPENAT, jail._FCNTL, jail._IOCTL, jail._CLONE, jail._PRCTL, jail._PRLIMIT, jail._SOCKETPAIR,
        jail._SENDTO, jail._RECVFROM, jail._CLONE3,
    }  # fmt: skip
    numbers = {call[column] for call in special}
    for number in {*range(600), *(0x40000000 + i for i in range(600))} - numbers:
        assert verdict(program, audit, number) == ("allow" if number in allowed else NO)
    assert verdict(program, audit ^ 1, 0) == "kill"
    clone, openat, prlimit, sendto = (call[column] for call in (jail._CLONE, jail._OPENAT, jail._PRLIMIT, jail._SENDTO))
    assert verdict(program, audit, clone, (17,)) == NO
    assert verdict(program, audit, clone, (0x3D0F00,)) == "allow"  # what pthread_create asks for
    assert verdict(program, audit, jail._CLONE3[column]) == os.strerror(38)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_TMPFILE):
        assert verdict(program, audit, openat, (0, 0, flags)) == os.strerror(13)
    assert verdict(program, audit, openat, (0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)) == "allow"
    assert verdict(program, audit, prlimit, (0, 7)) == "allow" and verdict(program, audit, prlimit, (99, 7)) == NO
    assert verdict(program, audit, sendto, (3,)) == "allow"
    for address in (1, 1 << 40):
        assert verdict(program, audit, sendto, (3, 0, 0, 0, address)) == NO


@pytest.mark.parametrize(("audit", "column"), MACHINES)
def test_who_has_a_child_may_kill_it_alone(audit: int, column: int):
    kill, wait = jail._KILL[column], jail._WAIT4[column]
    program = jail._filter(audit, column, 77)
    assert verdict(program, audit, kill, (77, 9)) == "allow" and verdict(program, audit, wait) == "allow"
    for other in (76, 1, 0xFFFFFFFF, 0):
        assert verdict(program, audit, kill, (other, 9)) == NO


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").exists(), reason="needs the kernel's headers")
def test_the_numbers_are_those_of_the_kernel():
    for column, header in enumerate(("asm/unistd_64.h", "asm-generic/unistd.h")):
        found = list(Path("/usr/include").glob(f"**/{header}"))
        if not found:
            continue
        text = found[0].read_text()
        lines = [line.split() for line in text.splitlines() if line.startswith("#define __NR")]
        known = {line[1].split("_", 3)[-1]: int(line[2]) for line in lines if len(line) > 2 and line[2].isdigit()}
        known.setdefault("newfstatat", known.get("fstatat", 79))
        for name, numbers in jail._ALLOWED.items():
            if numbers[column] is not None:
                assert known[name] == numbers[column], (header, name)
