"""Mail files as training records: parsed by the standard library, each once, in an order that never changes."""

from __future__ import annotations

import hashlib
import re
from email import message_from_bytes, policy
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

HAM, SPAM = 0, 1


class Mail(NamedTuple):
    """``text``: subject and body without markup; ``key``: a hash of the first 200 letters; ``sender``: see below.

    Letters only: copies of one advertisement differ in figures, and at the end.
    """

    text: str
    label: int
    key: str
    sender: str


class _Visible(HTMLParser):
    """The words of an HTML mail that its reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def parse(raw: bytes, label: int) -> Mail:
    """One mail as it came over the wire. The plain text counts where a mail brings both."""
    message = message_from_bytes(raw, policy=policy.default)
    part = message.get_body(("plain", "html"))
    body = ""
    if part is not None:
        try:
            body = part.get_content(errors="replace")
        except LookupError:  # spam names character sets that do not exist
            body = part.get_payload(decode=True).decode("latin-1")
        if part.get_content_type() == "text/html":
            page = _Visible()
            page.feed(body)
            body = " ".join(page.words)
    text = " ".join(f"{message['subject'] or ''} {body}".split())
    letters = re.sub(r"[\W\d_]+", "", text.lower())[:200]
    return Mail(text, label, hashlib.sha256(letters.encode()).hexdigest(), sender(message))


def sender(message: Message) -> str:
    """The mailing list that a mail came over, by its List-Id; otherwise the registered domain of its From address."""
    headers = {name.lower(): str(value) for name, value in message.raw_items()}  # unparsed: spam forges them
    if listed := re.search(r"<([\w.-]+)>\s*$", headers.get("list-id", "")):
        return f"list {listed[1].lower()}"
    found = re.search(r"@([\w-]+(?:\.[\w-]+)*)", headers.get("from", ""))
    if found is None:
        return "unknown"
    labels = found[1].lower().split(".")
    second = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in ("ac", "co", "com", "edu", "gov", "net", "org")
    return ".".join(labels[-3 if second else -2 :])


def read_mails(folder: Path) -> list[Mail]:
    """Every different mail below ``folder``, sorted by key: cut anywhere, no two mails of equal key are parted.

    A mail is a ``.txt`` file in a folder whose name starts with ``spam`` or holds ``ham``.
    """
    mails: dict[str, Mail] = {}
    for path in sorted(folder.rglob("*.txt")):
        kind = path.parent.name
        if kind.startswith("spam") or "ham" in kind:
            mail = parse(path.read_bytes(), SPAM if kind.startswith("spam") else HAM)
            mails.setdefault(mail.key, mail)
    return sorted(mails.values(), key=lambda mail: mail.key)
