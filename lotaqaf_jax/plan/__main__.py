"""``python -m lotaqaf_jax.plan``."""

import sys

from lotaqaf_jax.plan.command import main

sys.exit(main())
