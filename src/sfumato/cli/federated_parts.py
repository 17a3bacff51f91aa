"""Choices of the command line -> the library's frozen records."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import ConfigurationError
from ..federated import (
    Adam,
    Adaptive,
    All,
    Average,
    ClientLevel,
    Distributed,
    FixedCohort,
    LastLayers,
    LocalLevel,
    LocalTraining,
    LoRA,
    MinSeparation,
    Momentum,
    PoissonCohort,
    Prune,
    Quantize,
    SampleLevel,
    TopK,
    Uniform,
)
from ..schedules import Cosine
from .federated_recipes import FederatedRecipe
from .federated_settings import Choice, FederatedSettings

LAST_NOISE = 0.6  # of the first round's, under "decaying"


def unit_of(
    settings: FederatedSettings, clients: Collection[str]
) -> SampleLevel | ClientLevel | LocalLevel | Distributed:
    """Whose privacy is protected, with what budget."""
    delta, noise, norm = settings.delta, settings.noise_multiplier, settings.recipe.norm
    epsilon = _epsilons(settings, clients)
    if settings.level == "sample":
        return SampleLevel(epsilon, delta, max_grad_norm=norm, noise_multiplier=noise)
    if settings.level == "client":
        if isinstance(epsilon, Mapping) and settings.cohort.name != "poisson":
            raise ConfigurationError(
                f"--budgets with --cohort {settings.cohort.text}: clients with a smaller budget are drawn less often, "
                "which is for --cohort poisson:RATE",
                found=settings.cohort.text,
            )
        return ClientLevel(epsilon, delta, max_update_norm=norm, noise_multiplier=noise)
    if settings.level == "local":
        return LocalLevel(epsilon, delta, max_update_norm=norm, noise_multiplier=noise)
    if isinstance(epsilon, Mapping):
        raise ConfigurationError("--budgets: one noise protects every client of --unit distributed, so there is one ε")
    return Distributed(epsilon, delta, max_update_norm=norm, noise_multiplier=noise, max_dropout=settings.max_dropout)


def _epsilons(settings: FederatedSettings, clients: Collection[str]) -> float | Mapping[str, float] | None:
    if not settings.budgets or settings.epsilon is None:
        return settings.epsilon
    if unknown := sorted(set(settings.budgets) - set(clients)):
        raise ConfigurationError(f"--budgets names {unknown[0]!r}, which is no client", found=unknown)
    return dict.fromkeys(clients, settings.epsilon) | dict(settings.budgets)


def local_of(recipe: FederatedRecipe) -> LocalTraining:
    """What a client does in a round."""
    return LocalTraining(epochs=recipe.local_epochs, batch_size=recipe.batch_size, lr=recipe.lr)


def cohort_of(choice: Choice) -> PoissonCohort | FixedCohort | MinSeparation:
    """Who is asked in a round."""
    if choice.name == "poisson":
        return PoissonCohort(choice.numbers[0])
    if choice.name == "fixed":
        return FixedCohort(choice.counts[0])
    return MinSeparation(choice.counts[0], choice.counts[1])


def server_of(recipe: FederatedRecipe) -> Average | Momentum | Adam:
    """What the server does with the mean update."""
    return {"average": Average, "momentum": Momentum, "adam": Adam}[recipe.server](lr=recipe.server_lr)


def train_of(choice: Choice, public: bool) -> All | LastLayers | LoRA | TopK:
    """Which parameters are trained; the most important ones by public records, or else by the first released update."""
    if choice.name == "all":
        return All()
    if choice.name == "last":
        return LastLayers(*choice.counts)
    if choice.name == "lora":
        return LoRA(rank=choice.counts[0], alpha=2.0 * choice.counts[0])
    return TopK(fraction=choice.numbers[0], by="public" if public else "released", granularity="coordinate")


def codec_of(choice: Choice) -> Quantize | Prune | None:
    """How clients pack what they send."""
    if choice.name == "none":
        return None
    return Quantize(bits=choice.counts[0]) if choice.name == "quantize" else Prune(fraction=choice.numbers[0])


def allocation_of(name: str, rounds: int) -> Uniform | Cosine | Adaptive:
    """How the budget is spread over rounds: evenly, with noise that falls, or with noise that falls at a standstill."""
    if name == "uniform":
        return Uniform()
    return Adaptive() if name == "adaptive" else Cosine(steps=rounds, final=LAST_NOISE)
