"""``python -m fastattn.cli`` is the command ``fastattn``."""

import sys

from fastattn.cli.main import main

sys.exit(main())
