"""onnxruntime's GroupQueryAttention as a decode layer, its cache bound in place."""

from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

import visionpulse as vp

_ONNX = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16}


@cache
def _session(heads: int, kv_heads: int, dtype: torch.dtype, threads: int) -> Any:
    inputs = ("query", "key", "value", "past_key", "past_value")
    outputs = ("out", "present_key", "present_value")
    rows = ("seqlens_k", "total_sequence_length")
    node = helper.make_node(
        "GroupQueryAttention", [*inputs, *rows], outputs, domain="com.microsoft",
        num_heads=heads, kv_num_heads=kv_heads,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "decode",
        [
            *(helper.make_tensor_value_info(name, _ONNX[dtype], None) for name in inputs),
            *(helper.make_tensor_value_info(name, TensorProto.INT32, None) for name in rows),
        ],
        [helper.make_tensor_value_info(name, _ONNX[dtype], None) for name in outputs],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains)
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def attend(q: Tensor, kv: vp.KVCache) -> Tensor:
    """Dense attention; the op appends the newest token itself, so it gets the cache without it.

    Past and present are the same memory, as onnxruntime's own generation loop binds them.
    """
    rows, heads, dim = q.shape
    session = _session(heads, kv.kv_heads, q.dtype, torch.get_num_threads())
    out = torch.empty(rows, 1, heads * dim, dtype=q.dtype)
    last = kv.capacity - 1
    newest = [t[:, :, last].reshape(rows, 1, -1).contiguous() for t in (kv.k, kv.v)]
    lengths = torch.full((rows,), last, dtype=torch.int32)
    total = torch.tensor([kv.capacity], dtype=torch.int32)
    binding = session.io_binding()
    kind = _NUMPY[q.dtype]
    flat = q.reshape(rows, 1, -1).contiguous()
    for name, tensor in zip(
        ("query", "key", "value", "past_key", "past_value"),
        (flat, *newest, kv.k, kv.v),
        strict=True,
    ):
        binding.bind_input(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
    for name, tensor in (("seqlens_k", lengths), ("total_sequence_length", total)):
        binding.bind_input(name, "cpu", 0, np.int32, tuple(tensor.shape), tensor.data_ptr())
    for name, tensor in (("out", out), ("present_key", kv.k), ("present_value", kv.v)):
        binding.bind_output(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
    session.run_with_iobinding(binding)
    return out.view(rows, heads, dim)
