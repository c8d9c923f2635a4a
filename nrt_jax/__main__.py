"""`python -m nrt_jax`."""

import sys

from nrt_jax.cli import main

sys.exit(main())
