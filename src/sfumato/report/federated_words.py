"""Who must be trusted, what a federation cost, and what its guarantee leaves out, in words."""

from __future__ import annotations

import math

from .federated_facts import FederatedFacts, Federation
from .words import at_most, number

UNITS = {
    "sample": "one record of one client (sample level)",
    "client": "one whole client (client level, noise added by the server)",
    "local": "one whole client (client level, noise added by each client)",
    "distributed": "one whole client (client level, noise shares added by the clients)",
}
TRUST = {
    "sample": "A record trusts the client that holds it, and nobody else: what leaves a client is already private. "
    "The server and the other clients may be curious.",
    "client": "Every client trusts the server: it sees each update as it is, keeps the cohorts secret and adds the "
    "noise. Whoever sees only the models need not be trusted.",
    "local": "Nobody: each client adds all of its own noise before anything leaves it.",
    "distributed": "The secure sum, and that no more clients drop out or collude than was declared. THE MASKS OF THIS "
    "RUN ARE SIMULATED in one process: it shows what such a protocol yields, and protects nobody from this process.",
}


def costs(facts: FederatedFacts) -> list[str]:
    """What the guarantee cost in accuracy, in noise, in amplification and in bytes; one sentence each."""
    f = facts.federation
    gained = 100.0 * (facts.accuracy - facts.baseline)
    began = f"the {start(facts)} that the rounds began from ({100 * facts.baseline:.2f} %)"
    verdict = (
        f"{gained:+.2f} points against {began}."
        if gained > 0
        else f"NOT better ({gained:+.2f} points) than {began}, which costs no privacy: use that one."
        if f.public_records
        else f"NOT better ({gained:+.2f} points) than {began}: nothing was learned."
    )
    error = 100.0 * math.sqrt(facts.accuracy * (1.0 - facts.accuracy) / facts.data.test_records)
    chance = f"With {facts.data.test_records:,} test records an accuracy has a standard error of {error:.1f} points."
    found = [f"Accuracy {100 * facts.accuracy:.2f} %: {verdict} {chance}"]
    if f.noise_to_update is not None and math.isfinite(f.noise_to_update):
        found.append(
            f"The noise on the mean of a round is about {number(f.noise_to_update)} times as long as the longest "
            f"update a client may send; it shrinks with more clients ({f.clients:,} here), fewer trained parameters "
            f"({f.numbers:,}) and fewer rounds ({f.rounds:,})."
        )
    found.append(amplification(facts))
    each = (f.bytes_up + f.bytes_down) / max(1, sum(row.cohort for row in facts.rounds))
    found.append(
        f"{size(f.bytes_up)} sent by clients and {size(f.bytes_down)} by the server, {size(each)} for each client "
        "that was asked in a round."
    )
    return found


def start(facts: FederatedFacts) -> str:
    """What the rounds began from: public records alone made it, or none did."""
    if facts.federation.public_records:
        return "public model"
    return "model" if facts.training.own_model else "untrained model"


def amplification(facts: FederatedFacts) -> str:
    """ε with and without what random selection gains."""
    if facts.meaning.unamplified is None:
        return "No amplification by sampling is counted on."
    what = "batches inside the clients" if facts.federation.level == "sample" else "cohorts"
    return (
        f"ε = {at_most(facts.guarantee.epsilon)} counts on secret, random {what}; if they took turns, and all knew "
        f"whose turn it is, the same noise would give ε = {at_most(facts.meaning.unamplified)}."
    )


def federated_coverage(facts: FederatedFacts) -> str:
    """Which outputs the guarantee is about."""
    f = facts.federation
    if not math.isfinite(facts.guarantee.epsilon):
        return "Nothing is covered: treat the model as if it were the training data."
    seen = (
        "everything that any client sent, and so the global model"
        if f.level in ("sample", "local")
        else "the global model"
    )
    return (
        f"Covered: {seen} after every one of the {f.rounds:,} rounds taken together, and everything computed from "
        f"them. ε is the largest over all {f.clients:,} clients: they hold different records, so it is not their sum."
    )


def federated_not_covered(facts: FederatedFacts) -> list[str]:
    """What a reader might take to be covered and is not."""
    f = facts.federation
    found = []
    if f.public_records:
        found.append(
            f"The {f.public_records:,} public records: the starting model was trained on them without any protection."
        )
    whose = (
        " They are records of these clients that were held out: what it says of them is not part of any client's ε."
        if f.natural
        else ""
    )
    found.append(f"Test accuracy is computed from the common test records, without noise.{whose}")
    if f.level == "sample":
        found.append("A whole client: someone whose records fill a client is protected by far less.")
    if f.level in ("client", "distributed"):
        found.append(
            "What the server sees before it adds noise."
            if f.level == "client"
            else "What this process sees: it made every client's masks and noise itself."
        )
    found += [
        "How many clients were asked and answered in each round (the curves of cohorts and traffic, the rounds in "
        "report.json, metrics.jsonl): the guarantee counts on that draw being secret. Keep them with whoever runs the "
        "server."
        if f.level == "client" and f.amplified
        else "Who is enrolled, who was asked and who answered, and when.",
        "Other trainings on the same records, hyperparameter search included.",
        "Attacks on timing, on memory use, and on the machines while they train.",
    ]
    return found


def noise_text(federation: Federation) -> str:
    """The noise multipliers, one or a range."""
    low, high = federation.noise_multiplier
    return number(low) if low == high else f"{number(low)} to {number(high)} over clients"


def size(count: float) -> str:
    """Bytes as a person would write them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000.0 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000.0
    raise AssertionError("unreachable")
