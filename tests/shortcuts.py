"""What torch and ONNX Runtime do anew at each trace, export and session, done once in a run.

No result changes: a cache is left out that costs more than it gives on tiny models, lists that stay
the same are read once, and what nobody changes is shared in place of copied. The names are private
to torch; where one is gone, nothing is done.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def shortcuts() -> Iterator[None]:
    """All of them."""
    with pytest.MonkeyPatch.context() as patch:
        _look_symbolic_shapes_up_nowhere(patch)
        _write_no_stack_traces(patch)
        _share_where_nodes_are_from(patch)
        _list_operators_once(patch)
        _read_translations_once(patch)
        _run_sessions_on_as_many_threads_as_torch(patch)
        yield


def _look_symbolic_shapes_up_nowhere(patch: pytest.MonkeyPatch) -> None:
    """Compute symbolic shapes of results anew: an entry of their cache takes as long, few are hit.

    It is a quarter of the time of a trace of two layers. Shapes that are numbers are looked up.
    """
    start = FakeTensorMode.__init__

    def begin(self: FakeTensorMode, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        if self.shape_env is not None:
            self.cache_enabled = False

    patch.setattr(FakeTensorMode, "__init__", begin)


def _write_no_stack_traces(patch: pytest.MonkeyPatch) -> None:
    """Trace without the text of each node's call stack, a tenth of the time: no test reads it.

    Errors of tracing have the stack of their exception.
    """
    patch.setattr(torch.fx.config, "do_not_emit_stack_traces", True, raising=False)
    patch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # what it would log has them


def _share_where_nodes_are_from(patch: pytest.MonkeyPatch) -> None:
    """Copies of a graph share the records of the nodes that theirs were made from."""
    record = getattr(torch.fx.traceback, "NodeSource", None)
    if record is not None:
        patch.setattr(record, "__deepcopy__", lambda self, _: self, raising=False)


def _list_operators_once(patch: pytest.MonkeyPatch) -> None:
    """Look up all composite operators when there are new ones, not at each decomposition."""
    from torch._export import utils

    name, key = "_materialize_cpp_cia_ops", "CompositeImplicitAutograd"
    registered = getattr(torch._C, "_dispatch_get_registrations_for_dispatch_key", None)
    look_up = getattr(utils, name, None)
    if look_up is None or registered is None:
        return
    known: set[str] = set()

    def look_up_new_ones() -> None:
        found = set(registered(key))
        if not found <= known:
            look_up()
            known.update(found)

    patch.setattr(utils, name, look_up_new_ones)


def _read_translations_once(patch: pytest.MonkeyPatch) -> None:
    """Read the sources of torch's translations to ONNX once: a quarter of a second an export."""
    try:
        from torch.onnx._internal.exporter import _registration as registration
    except ImportError:
        return
    registry: Any = getattr(registration, "ONNXRegistry", None)
    if not hasattr(registry, "from_torchlib"):
        return
    read = cache(registry.from_torchlib)

    def copied(*version: int, **options: int) -> Any:
        found = copy.copy(read(*version, **options))
        found.functions = {name: list(each) for name, each in found.functions.items()}
        return found

    patch.setattr(registry, "from_torchlib", staticmethod(copied))


def _run_sessions_on_as_many_threads_as_torch(patch: pytest.MonkeyPatch) -> None:
    """Sessions of ONNX Runtime for which no number of threads is asked obey OMP_NUM_THREADS.

    By default each starts a thread a core, which spin until they get work, at the cost of the
    tests next to it.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        return
    import onnxruntime

    made = onnxruntime.SessionOptions

    def options() -> Any:
        one = made()
        one.intra_op_num_threads = int(threads)
        return one

    patch.setattr(onnxruntime, "SessionOptions", options)
