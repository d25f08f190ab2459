"""Settings that must be in place before jax is imported.

Tests run on the CPU with four devices, so that sharded code is exercised everywhere; an
unsharded computation still runs on the first one alone. JAX_PLATFORMS set by hand wins.
"""

import os

DEVICES = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=4".strip()
# No test talks to a model hub; a try fails at once and says so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
