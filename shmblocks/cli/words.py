"""How reports are put into words: ages, shares, names of holders."""

from __future__ import annotations

from shmblocks.cli.document import Style, Text
from shmblocks.cli.reports import Blocks, Holder, ParticipantRow

_STEPS = (("d", 86400), ("h", 3600), ("min", 60))
POOL_STYLES: dict[str, Style] = {
    "alive": "good",
    "dead": "warn",
    "incompatible": "warn",
}
STATE_STYLES: dict[str, Style] = {
    "free": "free",
    "reserved": "reserved",
    "published": "published",
    "leased": "leased",
    "draining": "draining",
}


def age_text(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 1 min`, `3 d 4 h`: two units at most."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = int(seconds)
    parts: list[str] = []
    for unit, size in _STEPS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    parts.append(f"{left} s")
    return " ".join(parts[:2])


def share_text(part: int, whole: int) -> str:
    """`25%` of blocks in use; never 0% or 100% unless it is exactly that."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 1:
        return "<1%"
    if 99 < percent < 100:
        return ">99%"
    return f"{percent:.0f}%"


def who_text(who: Holder | ParticipantRow) -> str:
    """`participant 3 (pid 4242, embedding)`, as the library's own messages name it."""
    if who.pid is None:
        return f"participant {who.place} (gone)"
    role = f", {who.role}" if who.role else ""
    dead = "" if who.alive else ", dead"
    return f"participant {who.place} (pid {who.pid}{role}{dead})"


def who(holder: Holder | ParticipantRow) -> Text:
    return Text(who_text(holder), who_style(holder))


def who_style(holder: Holder | ParticipantRow) -> Style:
    """The dead stand out; one who left in good order does not."""
    if holder.pid is None:
        return "dim"
    return "plain" if holder.alive else "bad"


def alive(is_alive: bool) -> Text:
    return Text("alive", "good") if is_alive else Text("dead", "bad")


def state(name: str) -> Text:
    return Text(name, STATE_STYLES.get(name, "plain"))


def account(blocks: Blocks) -> tuple[Text, ...]:
    """`40 free + 8 reserved + .. = 64 blocks`, with an unequal sign where that is not so."""
    parts: list[Text] = []
    for name, style in STATE_STYLES.items():
        count = getattr(blocks, name)
        parts += [Text(" + ")] if parts else []
        parts.append(Text(f"{count} {name}", style if count else "dim"))
    equal = Text(" = ") if blocks.balanced else Text(" != ", "bad")
    return (*parts, equal, Text(f"{blocks.all} blocks"))
