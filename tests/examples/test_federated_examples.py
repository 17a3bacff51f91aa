"""The federated examples: a made-up mailbox with senders and a random encoder, and synthetic flows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import federated_emails as mailing
import federated_stream as streaming
from mails import Mail, read_mails

SENDERS = ("a@list.example.org", "b@shop.example.com", "c@one.example.net", "d@two.example.co.uk")
COMMON = "--test 8 --labelled 6 --unlabelled 6 --own 3 --buckets 2 --tokens 12 --hidden 4 --epsilon 3 --json"


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples choose one thread for their process, not for that of the tests."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def mailbox(tmp_path: Path) -> Path:
    """40 different mails of four senders; every third one is spam."""
    words = "alpha beta gamma delta omega kappa".split()
    for number in range(40):
        kind, body = ("spam-1", "win money now") if number % 3 == 0 else ("easy-ham", "see you there at noon")
        text = " ".join(words[(number // 6**k) % 6] for k in range(3))  # what makes it a mail of its own
        folder = tmp_path / "mails" / kind
        folder.mkdir(parents=True, exist_ok=True)
        raw = f"From: {SENDERS[number % 4]}\nSubject: {body}\n\n{text}\n"
        (folder / f"{number}.txt").write_text(raw)
    return tmp_path / "mails"


def emails_run(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    mailing.main(arguments.split())
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("mode", ["head", "last", "lora", "encoder"])
def test_every_mode_spends_its_budget_and_no_more(
    mode: str, mailbox: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = emails_run(f"--data {mailbox} --model {encoder} --mode {mode} --rounds 2 {COMMON}", capsys)
    assert result["rounds"] == 2
    assert 2.9 < float(str(result["epsilon"])) <= 3.0
    assert isinstance(result["clients"], dict)
    assert sum(result["clients"].values()) == 40 - 8 - 12
    assert result["bytes_up"] == result["bytes_down"] != 0


def test_fewer_bits_make_shorter_answers(mailbox: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = f"--data {mailbox} --model {encoder} {COMMON} --rounds 1"
    whole, short = emails_run(common, capsys), emails_run(f"{common} --bits 1", capsys)
    assert 0 < int(str(short["bytes_up"])) < int(str(whole["bytes_up"])) / 8


def test_what_the_ledgers_hold_stays_spent(
    mailbox: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = f"--data {mailbox} --model {encoder} {COMMON} --rounds 2 --ledgers {tmp_path / 'ledgers'}"
    first, again = emails_run(common, capsys), emails_run(common, capsys)
    assert (first["stopped"], again["stopped"]) == ("rounds", "budget")
    assert again["epsilon"] == first["epsilon"]
    assert again["accuracy"] == again["untuned"]


def test_states_are_kept_for_these_mails_and_this_length_only(mailbox: Path, encoder: Path, tmp_path: Path) -> None:
    mails = read_mails(mailbox)
    s = mailing.Settings(str(mailbox), tokens=12, cache=str(tmp_path / "states.safetensors"))
    first = mailing.encoded(mails, s, encoder)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(len(mails)))
    (name,) = load_file(s.cache or "")
    save_file({name: first * 2.0}, s.cache or "")
    assert torch.equal(mailing.encoded(mails, s, encoder), first * 2.0)  # as it was kept
    torch.testing.assert_close(mailing.encoded(mails[1:], s, encoder), first[1:])  # other mails: made again


def test_no_mail_is_in_two_parts_and_no_private_mail_decides_who_is_a_client() -> None:
    mails = [Mail(f"{k}", k % 2, f"{k:04}", f"s{k % 10}.org") for k in range(400)]
    s = mailing.Settings("", test=50, labelled=20, unlabelled=30, own=5, buckets=3)
    parts = mailing.divided(mails, s)
    rows = [*parts.test, *parts.labelled, *parts.unlabelled, *(row for held in parts.clients.values() for row in held)]
    assert sorted(rows) == list(range(400))
    assert {name for name in parts.clients if not name.startswith("others")} == {f"s{k}.org" for k in range(10)}
    fewer = mailing.divided([m for k, m in enumerate(mails) if k < 100 or m.sender != "s3.org"], s)
    assert set(fewer.clients) == set(parts.clients) - {"s3.org"}
    few = mailing.divided(mails, mailing.Settings("", test=350, labelled=5, unlabelled=5))
    assert all(name.startswith("others ") for name in few.clients)


def test_a_stream_costs_one_round_however_many_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    streaming.main("--devices 3 --flows 120 --rounds 4 --epsilon 2 --json".split())
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert [line["round"] for line in result["rounds"]] == [1, 2, 3, 4]
    assert all(line["answered"] == 3 for line in result["rounds"])
    first, *_, last = (line["epsilon"] for line in result["rounds"])
    assert first == last == result["epsilon"]
    assert 1.9 < last <= 2.0
    assert result["epsilon_if_flows_came_back"] > 1.5 * last
    assert printed.err.count("ε = ") == 4


def test_no_flow_is_drawn_twice() -> None:
    traffic = streaming.Traffic(streaming.Settings())
    draws = [traffic.flows(f"device {d}", r, 50).tensors[0] for d in range(3) for r in range(4)]
    rows = torch.cat(draws)
    assert len(rows.unique(dim=0)) == len(rows)
    again = streaming.Traffic(streaming.Settings()).flows("device 0", 0, 50).tensors[0]
    assert torch.equal(again, draws[0])


@pytest.mark.parametrize("module", [mailing, streaming])
def test_they_start_as_scripts(module: object) -> None:
    path = str(getattr(module, "__file__", ""))
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--epsilon" in done.stdout
