"""What XLA is told before JAX is there to tell it, each with its reason (floor 0)."""

from __future__ import annotations

import os

from phased_ift_jax.records import UserError

# on GPUs: no kernel whose additions come in another order each time, and none chosen by a timing that may turn out otherwise next time
DETERMINISTIC = {"--xla_gpu_deterministic_ops": "true"}


def set_flags(deterministic: bool) -> None:
    """Add to XLA_FLAGS what the run asks for; must come before JAX makes its first array. What the user has set there stays.

    Raises:
        UserError: the user has set the opposite.
    """
    given = dict(flag.partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split())
    wanted = DETERMINISTIC if deterministic else {}
    for name, value in wanted.items():
        if given.get(name, value).lower() not in (value, ""):
            raise UserError(f"training.deterministic: XLA_FLAGS has {name}={given[name]}; take it out of there, or set training.deterministic false")
    added = [f"{name}={value}" for name, value in wanted.items() if name not in given]
    if added:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *added]).strip()
