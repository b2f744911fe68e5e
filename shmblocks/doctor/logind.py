"""Will systemd-logind delete the user's segments at logout (`RemoveIPC=yes`, its default)?

It removes everything in /dev/shm of an ordinary user when that user's last session ends, under
processes that go on running. System users, lingering users and machines without logind are spared.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator

from shmblocks.doctor.host import CheckResult, Host

ADVICE = (
    "run as a system user, or `loginctl enable-linger USER`, or put `[Login]` and `RemoveIPC=no` "
    "into /etc/systemd/logind.conf.d/shm.conf and restart systemd-logind"
)

# Where systemd looks, the strongest first.
_FOLDERS = ("/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd")
_SYSTEM_UID_MAX = 999  # where /etc/login.defs does not say
_PROPERTY = (
    "busctl get-property org.freedesktop.login1 /org/freedesktop/login1 "
    "org.freedesktop.login1.Manager RemoveIPC"
)


def remove_ipc(host: Host) -> Iterator[CheckResult]:
    """The cheap exceptions first, then logind itself, then its files."""
    spared = _why_spared(host, os.getuid())
    if spared:
        yield CheckResult("remove-ipc", "ok", spared)
        return
    answer = (host.ask(_PROPERTY.split()) or "").strip()
    if answer in ("b true", "b false"):
        removes, source = answer == "b true", "as logind itself says"
    else:
        removes, source = _configured(host)
    if removes:
        found = f"RemoveIPC=yes ({source}): at logout this user's segments are deleted"
        yield CheckResult("remove-ipc", "warn", found, ADVICE)
    else:
        yield CheckResult("remove-ipc", "ok", f"RemoveIPC=no ({source})")


def _why_spared(host: Host, uid: int) -> str:
    if not host.path("/run/systemd/system").is_dir():
        return "systemd does not run this machine or container, so no logind deletes segments"
    if uid <= _system_uid_max(host):
        return f"user {uid} is a system user, whose segments logind leaves alone"
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""
    if host.path(f"/var/lib/systemd/linger/{name}").exists():
        return f"user {name} lingers, so logind leaves the segments alone"
    return ""


def _system_uid_max(host: Host) -> int:
    found = re.search(r"^SYS_UID_MAX\s+(\d+)", host.read("/etc/login.defs") or "", re.MULTILINE)
    return int(found.group(1)) if found else _SYSTEM_UID_MAX


def _configured(host: Host) -> tuple[bool, str]:
    """What logind would read, and where it says so."""
    removes, source = True, "systemd's default, set nowhere"
    for path in _files(host):
        for line in (host.read(path) or "").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "RemoveIPC":
                removes = value.strip().lower() in ("yes", "true", "1", "on", "y", "t")
                source = path
    return removes, source


def _files(host: Host) -> Iterator[str]:
    """The main file, then the drop-ins by name; of equal names the strongest folder's is read."""
    mains = (f"{folder}/logind.conf" for folder in _FOLDERS)
    yield from [path for path in mains if host.path(path).is_file()][:1]
    drop_ins: dict[str, str] = {}
    for folder in reversed(_FOLDERS):
        for file in host.path(f"{folder}/logind.conf.d").glob("*.conf"):
            drop_ins[file.name] = f"{folder}/logind.conf.d/{file.name}"
    yield from (drop_ins[name] for name in sorted(drop_ins))
