"""`python -m nanoflow_jax` is `nanoflow`."""

import sys

from nanoflow_jax.cli import main

sys.exit(main())
