"""A process of a pod as `phased_ift_jax.train`, but that each keeps what it has compiled:  python pod_member.py CONFIG ...

JAX lets process 0 alone write what has been compiled, under a key that is the same for all on TPUs and GPUs. On CPUs each process has a key
of its own, so that all but one would compile everything at every start.
"""

from __future__ import annotations

import types

from phased_ift_jax import cli, processes, train

join = processes._join


def joined() -> processes._Group | None:
    group = join()
    from jax._src import compiler  # not before the fork of `processes.supervise`

    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    return group


processes._join = joined
cli.run(train.main, before=train.before)
