"""`python -m nla_jax.cli`."""

import sys

from nla_jax import cli

sys.exit(cli.main())
