"""The e-mail example on mails and a BERT made up here: nothing is downloaded, nothing pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import emails
import mails

PLAIN = b"From: a@example.org\nSubject: Meeting\nContent-Type: text/plain; charset=utf-8\n\nSee you\n there at noon.\n"
COPY = PLAIN.replace(b"noon.", b"1 noon, 2.").replace(b"a@", b"b@")  # the same letters
TWO_PARTS = b"""Subject: =?utf-8?q?caf=C3=A9?=
MIME-Version: 1.0
Content-Type: multipart/alternative; boundary=cut

--cut
Content-Type: text/plain

the plain part
--cut
Content-Type: text/html

<p>the other part</p>
--cut--
"""
PAGE = b"Subject: Win\nContent-Type: text/html\n\n<style>p {}</style><p>Win <b>money</b></p><script>go()</script>now"
ODD = b"Subject: money now\nContent-Type: text/plain; charset=NO-SUCH-SET\n\ncaf\xe9 spam\n"
EMPTY = b"Content-Type: image/png\nContent-Transfer-Encoding: base64\n\niVBORw0KGgo=\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six mails, one of which is a copy."""
    for number, (kind, raw) in enumerate(
        [("easy-ham", PLAIN), ("easy-ham", COPY), ("hard-ham", TWO_PARTS), ("spam-1", PAGE), ("spam-1", ODD),
         ("spam-2", EMPTY)]
    ):  # fmt: skip
        (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / kind / f"{number}.txt").write_bytes(raw)
    (tmp_path / "data" / "README.txt").write_text("no mail")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (PLAIN, "Meeting See you there at noon."),
        (TWO_PARTS, "café the plain part"),
        (PAGE, "Win Win money now"),
        (ODD, "money now café spam"),
        (EMPTY, ""),
    ],
)
def test_a_mail_is_its_subject_and_what_a_reader_sees(raw: bytes, text: str) -> None:
    assert mails.parse(raw, mails.SPAM).text == text


@pytest.mark.parametrize(
    ("headers", "sender"),
    [
        (b"From: A B <a@mail.example.org>\n", "example.org"),
        (b"From: a@news.example.co.uk\n", "example.co.uk"),
        (b"From: a@example.org\nList-Id: Some talk <talk.Lists.example.net>\n", "list talk.lists.example.net"),
        (b"From: nobody\n", "unknown"),
        (b"From: =?x?q?=ff\n", "unknown"),
    ],
)
def test_the_sender_is_the_list_or_else_the_registered_domain(headers: bytes, sender: str) -> None:
    assert mails.parse(headers + b"\ntext\n", mails.HAM).sender == sender


def test_each_mail_is_read_once_whatever_its_file_is_called(folder: Path) -> None:
    read = mails.read_mails(folder)
    assert len(read) == 5
    assert sum(mail.label for mail in read) == 3
    assert mails.parse(PLAIN, 0).key == mails.parse(COPY, 0).key
    for path in list(folder.rglob("*.txt")):
        path.rename(path.with_name(f"x{9 - int(path.stem[0]) if path.stem[0].isdigit() else 0}.txt"))
    assert [mail.key for mail in mails.read_mails(folder)] == [mail.key for mail in read]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("mode", ["head", "full", "lora", "tied"])
def test_each_mode_trains_within_its_budget(
    mode: str, folder: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--data {folder} --model {encoder} --mode {mode} --train 0 --test 1 --tokens 12 --epochs 1 --steps 2"
    emails.main([*arguments.split(), "--runs", "1", "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    (run,) = result["runs"]
    assert run["steps"] == 2
    assert 2.9 < run["epsilon"] <= 3.0
    assert set(run["tiers"]) == {"rule"}
    assert ("without_privacy" in result) == (mode == "head")
    assert printed.err.count("ε = ") >= 1  # a draw of nobody is charged without a turn of the loop


def test_the_tied_mode_uses_the_word_embedding_twice(encoder: Path) -> None:
    from transformers import AutoTokenizer

    model = emails.build("tied", encoder, AutoTokenizer.from_pretrained(encoder, local_files_only=True))
    lm = model.get_submodule("masked_lm")
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight


def test_it_starts_as_a_script() -> None:
    done = subprocess.run([sys.executable, emails.__file__, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--mode {head,full,lora,tied}" in done.stdout
