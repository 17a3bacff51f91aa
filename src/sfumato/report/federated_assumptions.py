"""What the guarantee of a federation rests on, each item marked: checked, declared or unknown."""

from __future__ import annotations

import math

from .assumptions import Assumption
from .federated_facts import FederatedFacts
from .words import number

_BOUNDED = {
    "sample": "Inside every client each record's gradient was clipped to norm {norm} at every step; a gradient that "
    "bypassed clipping would have stopped that client.",
    "client": "The server decoded and checked every reply and then clipped it to norm {norm}: nothing a client sends "
    "moves the sum by more. The divisor is a public constant.",
    "local": "Each client clipped its update to norm {norm} before it added its noise.",
    "distributed": "Each client clipped its update to norm {norm} and rounded it to whole numbers within a bound that "
    "was proved to fit the modulus.",
}


def federated_assumptions(facts: FederatedFacts) -> list[Assumption]:
    """Every assumption of the guarantee, strongest knowledge first."""
    found = [*_mechanism(facts), *_trust(facts), *_data(facts), *_scope(facts)]
    return sorted(found, key=lambda a: ("checked", "declared", "unknown").index(a.status))


def _mechanism(facts: FederatedFacts) -> list[Assumption]:
    f, ledgers = facts.federation, facts.ledgers
    secure = f.noise_level == "secure"
    return [
        Assumption("Every contribution is bounded", "checked", _BOUNDED[f.level].format(norm=number(f.norm))),
        Assumption(
            "Sampling matches the accounting",
            "checked",
            "Each client drew its own batches; the batch's accounting event came from the same plan. No credit is "
            "taken for the selection of clients."
            if f.level == "sample"
            else f"The sampler of cohorts ({f.cohort}) draws the clients and returns what the draw costs: there is no "
            "second place where it is stated.",
        ),
        Assumption(
            "Charged before release",
            "checked",
            f"{ledgers.entries:,} entries in {ledgers.files:,} ledger{'s' if ledgers.files > 1 else ''}, each written "
            f"before what it pays for was released; the chains were verified, and the one that proves ε ends in "
            f"{ledgers.head[:16]}.",
        ),
        Assumption(
            "The noise cannot be predicted",
            "checked" if secure else "unknown",
            "AES-256 in counter mode, keyed by the operating system; no seed reaches noise or the selection of clients "
            "and records."
            if secure
            else f"Noise level '{f.noise_level}': a research generator, not fit for production.",
        ),
        Assumption(
            "Exact arithmetic",
            "unknown",
            "The noise is exact integer noise, but clipping and rotation before it are floating point."
            if f.level == "distributed"
            else "The accounting assumes real numbers. Attacks that exploit floating-point rounding are not guaranteed "
            "against.",
        ),
    ]


def _trust(facts: FederatedFacts) -> list[Assumption]:
    f = facts.federation
    found = []
    if f.level == "client":
        found.append(
            Assumption(
                "The server is honest",
                "declared",
                "It sees every update as it is, adds the noise and forgets the updates"
                + (", and it keeps secret who was asked in which round." if f.amplified else "."),
            )
        )
    if f.level == "distributed":
        found.append(
            Assumption(
                "The server sees the sum alone", "unknown", "The masks are simulated, in one process, for research."
            )
        )
    if f.level in ("sample", "local"):
        found.append(
            Assumption(
                "Clients follow the protocol",
                "checked",
                "Here one process ran all clients with this library's code. Elsewhere each client checks its own.",
            )
        )
    return found


def _data(facts: FederatedFacts) -> list[Assumption]:
    data, f, training = facts.data, facts.federation, facts.training
    found = [Assumption("Preprocessing", "checked", text) for text in data.checked]
    found += [Assumption("Preprocessing", "declared", text) for text in data.declared]
    if f.public_records:
        found.append(
            Assumption(
                "The public part is public",
                "declared",
                f"{f.public_records:,} records were set apart and are not protected. No client holds any of them.",
            )
        )
    population = data.train_records if facts.guarantee.unit == "record" else f.clients
    found += [
        Assumption(
            "The starting point does not depend on protected data",
            "declared" if training.own_model else "checked",
            "The model came from user code; pre-trained weights are outside this guarantee."
            if training.own_model
            else f"Built-in model from seed {training.seed}, trained on the public part and nothing else."
            if f.public_records
            else f"Built-in model from seed {training.seed}, not trained before.",
        ),
        Assumption(
            "Clients hold different people's records",
            "declared" if f.natural else "checked",
            "Someone with records at several clients spends the ε of all of them together."
            if f.natural
            else "This command divided the records; that no record is repeated in the data is taken on trust.",
        ),
        Assumption(
            "Sizes are public",
            "declared",
            f"The number of clients ({f.clients:,}), who they are, and "
            + (
                "how many records each holds (it sets the rate at which the client draws them) are not protected."
                if f.level == "sample"
                else "the expected size of a cohort are not protected. How many records a client holds is not used."
            ),
        ),
        Assumption(
            "Test records are separate",
            "declared",
            f"{data.test_records:,} common test records were never given to a client; that none is repeated there is "
            "not checked.",
        ),
    ]
    if math.isfinite(facts.guarantee.epsilon):
        small = facts.guarantee.delta < 1.0 / population
        found.append(
            Assumption(
                "δ is small enough",
                "checked" if small else "unknown",
                f"δ = {number(facts.guarantee.delta)} is {'' if small else 'not '}below 1/n = "
                f"{number(1.0 / population)} for n = {population:,} {facts.guarantee.unit}s.",
            )
        )
    return found


def _scope(facts: FederatedFacts) -> list[Assumption]:
    return [
        Assumption("Last model, not best model", "checked", "The model saved is that of the last round."),
        Assumption(
            "Other trainings on these records",
            "unknown",
            "Not known to this run. Pass --ledger-dir to all runs on the same clients to add them up.",
        ),
        Assumption(
            "Hyperparameters were chosen without these records",
            "unknown",
            "A search on the same records spends budget that this report does not see. The default recipes were "
            "themselves chosen on training records of digits.",
        ),
    ]
