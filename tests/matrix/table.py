"""The model table of the documentation: ``python -m tests.matrix.table > docs/models.md``."""

import warnings

import torch
from tests.matrix.test_matrix import FAMILIES, ONE_BY_ONE, REFUSED
from tests.oracle.oracle import recorded

HEAD = """# Models

Each of these models is built from a small configuration with random weights and compared with a loop over single
records in float64: squared norms, clipped sums and per-sample gradients agree to 1e-9. Then one private step through
the engine releases the clipped sum. `tests/matrix` is the list in code; `python -m tests.matrix.table` writes this one.

**rule**: the gradient is taken from the operations themselves. **vmap**: the module that owns the parameter runs under
`torch.vmap`, one copy of its parameters for each record. **one by one**: it runs on each record alone. All three are
exact; they differ in speed. What cannot be done exactly is refused, and stands at the end.
"""
TITLES = {
    "language": "Language models (transformers)",
    "perception": "Images, sound, several inputs (transformers)",
    "adapters": "Adapters (peft)",
    "plain": "Plain PyTorch",
}
NAMES = {"rule": "rule", "vmap": "vmap", "microbatch": "one by one"}
WHY = {
    "CLIP, texts against pictures of the batch": "its loss compares all records; its two towers are exact",
    "GPT-2, reentrant checkpointing": "a backward inside the backward: use `use_reentrant=False`",
    "ResNet, not fixed": "BatchNorm: use `sf.fix`",
    "Mixtral with its router loss": "load balancing is a product of means over the whole batch",
    "GPT-2 + DoRA": "peft makes a new trainable parameter in every forward of a transposed layer (Llama + DoRA works)",
}


def shares(name: str, case: object) -> str:
    """How the trainable parameters of a model are spread over the tiers."""
    torch.manual_seed(1)
    model = case.build().train(case.train)  # type: ignore[attr-defined]
    tape, _ = recorded(model, case.inputs(), case.loss, case.reduction, case.batch_dim)  # type: ignore[attr-defined]
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    total = sum(sizes.values())
    parts = {t: sum(s for n, s in sizes.items() if tape.tiers[n] == t) for t in NAMES}
    found = [f"{NAMES[t]} {100 * n / total:.0f} %" if n < total else NAMES[t] for t, n in parts.items() if n]
    return ", ".join(found) + (f": {ONE_BY_ONE[name]}" if name in ONE_BY_ONE else "")


def main() -> None:
    warnings.simplefilter("ignore")
    print(HEAD)
    for family, module in FAMILIES.items():
        print(f"## {TITLES[family]}\n\n| model | tier of its parameters |\n|---|---|")
        for name, case in module.MODELS.items():
            print(f"| {name} | {shares(name, case)} |")
        print()
    print("## Refused\n\n| model | because |\n|---|---|")
    for name in REFUSED:
        print(f"| {name} | {WHY[name]} |")


if __name__ == "__main__":
    main()
