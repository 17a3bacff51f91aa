"""The whole deployment on this machine: a SuperLink and two clinics, with TLS and authenticated nodes.

python examples/flower_app/run.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from sfumato.integrations.flower import Deployment

CLINICS = ("clinic-0", "clinic-1")


def main(folder: Path) -> dict[str, object]:
    """Run it; keys, logs and ledgers stay in ``folder``."""
    config = {
        name: {"part": number, "parts": len(CLINICS), "ledger": str(folder / f"{name}.db")}
        for number, name in enumerate(CLINICS)
    }
    with Deployment(folder / "flower", config) as deployment:
        return deployment.run(Path(__file__).parent, timeout=300)


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="sfumato-flower-"))
    print(json.dumps(main(place), indent=2))
