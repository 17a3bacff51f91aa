"""``python -m sfumato.cli``."""

import sys

from .main import main

sys.exit(main())
