# SPDX-License-Identifier: Apache-2.0
"""Attention speed of KV-cache layouts: per layer, token-major and page-major.

Needs a Hopper GPU, torch and triton, and vLLM's FlashAttention 3 where it imports. The Triton
kernels are SGLang's own, loaded from the folder that holds `sglang/` without importing the package.
One JSON line per case, a table at the end.

    python benchmarks/gpu/kv_layouts.py --sglang-root SITE_PACKAGES --out build/layouts.jsonl

  L      per layer: K of a layer is [slots, H, D], contiguous             (today's SGLang)
  T      token-major [slot][layer][k|v][H][D]: K of a layer is [slots, H, D], slot stride L*2*H*D
  P<n>   page-major [page][layer][k|v][n tokens][H][D]: K of a layer is [pages, n, H, D]

ps is the page size the kernel is told. Placement of the slots: seq (requests one after another from
slot 0), shuf<g> (groups of g slots drawn at random from the whole arena).
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

# The budget covers the imports below. Of assignments, only a dunder may stand before imports.
__started__ = time.monotonic()

import torch
import triton
import triton.language as tl

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float16
ITEM = 2  # Bytes of an element of DTYPE.
GIB = 1 << 30
MIN_LEFT_S = 4  # With less of the budget left no case starts.

Row = dict[str, Any]
KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """The model whose attention is measured, and the cases it is measured on."""

    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    decode: tuple[tuple[int, int], ...]  # Batch, context.
    extend: tuple[int, int, int]  # Batch, prefix, new tokens.
    store: tuple[int, ...]  # Tokens.
    mla_layers: int
    mla_decode: tuple[tuple[int, int], ...]  # Batch, context.

    @property
    def row(self) -> int:
        """Elements of K, or of V, of one token in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def slot(self) -> int:
        """Elements of one token in all layers."""
        return self.layers * 2 * self.row


FULL = Sizes(
    layers=32,
    kv_heads=8,
    q_heads=32,
    head_dim=128,
    decode=((8, 1024), (1, 8192), (1, 1024), (64, 1024), (8, 8192), (32, 8192), (256, 1024)),
    extend=(4, 4096, 512),
    store=(256, 8192),
    mla_layers=27,
    mla_decode=((8, 8192), (64, 1024)),
)
TINY = Sizes(
    layers=2,
    kv_heads=2,
    q_heads=8,
    head_dim=64,
    decode=((2, 256),),
    extend=(2, 256, 32),
    store=(16,),
    mla_layers=2,
    mla_decode=((2, 256),),
)
TINY_SLOTS = 4096
CHECK = (3, 176)  # Batch, context.
# DeepSeek-V2-Lite-like: 16 heads, rows of 576, of which 512 are the value.
MLA_HEADS, MLA_ROW, MLA_VALUE = 16, 576, 512
LAYOUT_PS = (
    ("L", 1),
    ("T", 1),
    *((layout, ps) for ps in (16, 64, 128) for layout in ("L", "T", f"P{ps}")),
)
STORE_LAYOUT_PS = (("L", 1), ("T", 1), ("P16", 16), ("P64", 64), ("P128", 128))


@dataclass(frozen=True)
class Case:
    """One measurement. Its row names what is set, in this order."""

    op: str
    kernel: str
    layout: str
    ps: int
    placement: str = ""
    tokens: int = 0
    batch: int = 0
    ctx: int = 0
    q: int = 0

    def row(self) -> Row:
        return {name: value for name, value in asdict(self).items() if value}


class Report:
    """The rows so far, printed as they come, and the time that is left."""

    def __init__(self, budget_s: float, out: TextIO | None) -> None:
        self.budget_s, self.out = budget_s, out
        self.rows: list[Row] = []

    def emit(self, row: Row) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self.out:
            self.out.write(line + "\n")
            self.out.flush()
        self.rows.append(row)

    def elapsed(self) -> float:
        return time.monotonic() - __started__

    def left(self) -> float:
        return self.budget_s - self.elapsed()

    def attempt(self, load: Callable[[], Any], error: str) -> Any:
        """What `load` returns, or None and a row."""
        try:
            return load()
        except Exception:
            self.emit({"error": error, "trace": traceback.format_exc()[-800:]})
            return None


# ---------------------------------------------------------------- the kernels


def _package(name: str) -> Any:
    module = types.ModuleType(name)
    module.__path__ = []
    sys.modules[name] = module
    return module


def load_sglang_kernels(root: Path) -> dict[str, Any]:
    """SGLang's kernels, without SGLang. `root` may also be the kernels' own folder."""
    below = root / "sglang/srt/layers/attention/triton_ops"
    folder = below if below.is_dir() else root
    base = "sglang.srt.layers.attention.triton_ops"
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.attention", base):
        _package(name)
    utils = _package("sglang.srt.utils")
    utils.is_hip = lambda: False
    utils.is_cuda = lambda: CUDA
    utils.is_gfx95_supported = lambda: False
    loaded = {}
    for name in ("prefill_attention", "decode_attention", "extend_attention", "metadata"):
        full = f"{base}.{name}"
        spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
        loaded[name] = module
    return loaded


def load_fa3() -> Callable[..., Any]:
    """FlashAttention 3 of vLLM; where it lies depends on the version."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except Exception:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func
    return flash_attn_varlen_func


@triton.jit
def store_rows(
    k_dst,
    v_dst,
    k_src,
    v_src,
    loc_ptr,
    k_page,
    k_tok,
    v_page,
    v_tok,
    src_row,
    PAGE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program copies the row of one token of K or of V, as SGLang's CUDA store does."""
    pid = tl.program_id(0)
    loc = tl.load(loc_ptr + pid).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < ROW
    src = pid.to(tl.int64) * src_row + offs
    if tl.program_id(1) == 0:
        at = (loc // PAGE) * k_page + (loc % PAGE) * k_tok
        tl.store(k_dst + at + offs, tl.load(k_src + src, mask=mask), mask=mask)
    else:
        at = (loc // PAGE) * v_page + (loc % PAGE) * v_tok
        tl.store(v_dst + at + offs, tl.load(v_src + src, mask=mask), mask=mask)


# ---------------------------------------------------------------- arena, views, placements


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def int32_steps(count: int, step: int) -> torch.Tensor:
    """0, step, ..., count * step."""
    return (torch.arange(count + 1, device=DEVICE) * step).to(torch.int32)


def place(total: int, batch: int, ctx: int, placement: str) -> torch.Tensor:
    """[batch, ctx] slots out of `total`."""
    if placement == "seq":
        return torch.arange(batch * ctx, device=DEVICE).view(batch, ctx)
    group = int(placement.removeprefix("shuf"))
    per = -(-ctx // group)
    groups = torch.randperm(total // group, device=DEVICE)[: batch * per]
    slots = groups[:, None] * group + torch.arange(group, device=DEVICE)
    return slots.view(batch, per * group)[:, :ctx].contiguous()


def placements(ps: int) -> list[str]:
    return ["seq", "shuf1", "shuf16"] if ps == 1 else ["seq", f"shuf{ps}"]


def fitting_slots(sizes: Sizes, max_gib: float) -> int:
    """Slots in `max_gib`, or in what the GPU has free less 6 GiB; a multiple of every page size."""
    free = torch.cuda.mem_get_info()[0]
    num_bytes = min(max_gib * GIB, free - 6 * GIB)
    return int(num_bytes // (sizes.slot * ITEM)) // 128 * 128


class Arena:
    """The memory of the cache, full of noise, seen as any layout."""

    def __init__(self, sizes: Sizes, slots: int) -> None:
        self.sizes, self.slots = sizes, slots
        self.memory = torch.empty(slots * sizes.slot, dtype=DTYPE, device=DEVICE)
        self._views: dict[str, list[KV]] = {}
        self._fill()

    def _fill(self) -> None:
        chunk = noise(min(self.memory.numel(), 32 << 20))
        for part in self.memory.split(chunk.numel()):
            part.copy_(chunk[: part.numel()])

    def place(self, batch: int, ctx: int, placement: str) -> torch.Tensor:
        return place(self.slots, batch, ctx, placement)

    def views(self, layout: str) -> list[KV]:
        """K and V of every layer, as the pool of that layout would hold them."""
        if layout not in self._views:
            self._views[layout] = self._make_views(layout)
        return self._views[layout]

    def _make_views(self, layout: str) -> list[KV]:
        layers = self.sizes.layers
        head = (self.sizes.kv_heads, self.sizes.head_dim)
        if layout == "L":
            a = self.memory.view(layers, 2, self.slots, *head)
            return [(a[i, 0], a[i, 1]) for i in range(layers)]
        if layout == "T":
            a = self.memory.view(self.slots, layers, 2, *head)
        else:
            page = int(layout.removeprefix("P"))
            a = self.memory.view(self.slots // page, layers, 2, page, *head)
        return [(a[:, i, 0], a[:, i, 1]) for i in range(layers)]

    @property
    def mla_slots(self) -> int:
        return min(self.memory.numel() // (self.sizes.mla_layers * MLA_ROW), 1 << 20)

    def mla_views(self, layout: str) -> list[torch.Tensor]:
        """The rows of every layer of the MLA model."""
        layers, slots = self.sizes.mla_layers, self.mla_slots
        memory = self.memory[: slots * layers * MLA_ROW]
        if layout == "L":
            return list(memory.view(layers, slots, 1, MLA_ROW).unbind(0))
        return list(memory.view(slots, layers, 1, MLA_ROW).unbind(1))


# ---------------------------------------------------------------- running and timing


@dataclass
class Bench:
    """What every case needs."""

    report: Report
    sizes: Sizes
    reps: int
    arena: Arena
    multiprocessors: int
    sglang: Any  # The modules by name, or None.
    fa3: Any  # The function, or None.

    @property
    def kernels(self) -> list[str]:
        return [name for name, there in (("triton", self.sglang), ("fa3", self.fa3)) if there]

    def run(
        self,
        case: Case,
        build: Callable[["Bench", Case], Any],
        measure: Callable[["Bench", Case, Any], Row],
    ) -> None:
        """Run one case; a failure is a row, not the end."""
        if self.report.left() < MIN_LEFT_S:
            self.report.emit({**case.row(), "error": "out of time"})
            return
        try:
            self.report.emit({**case.row(), **measure(self, case, build(self, case))})
        except Exception as e:
            self.report.emit({**case.row(), "error": f"{type(e).__name__}: {str(e)[:300]}"})
            if CUDA:
                with contextlib.suppress(Exception):
                    torch.cuda.synchronize()


def _captured(fn: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """The replay of a CUDA graph of `fn`, or `fn` itself where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
    except Exception:
        torch.cuda.synchronize()
        return fn, "events"
    return graph.replay, "graph"


def timed(fn: Callable[[], None], reps: int) -> tuple[float, str]:
    """Median milliseconds of `fn`, and how they were taken."""
    if not CUDA:
        t = time.perf_counter()
        fn()
        return (time.perf_counter() - t) * 1e3, "cpu"
    call, how = _captured(fn)
    for _ in range(3):
        call()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(reps)
    ]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs), how


def rates(bench: Bench, op: "Operation", num_bytes: int) -> Row:
    """Time per layer, and the rate at which `num_bytes` in all layers went by."""
    ms, mode = timed(op, bench.reps)
    return {
        "us_per_layer": round(ms * 1e3 / len(op.kv), 2),
        "gbs": round(num_bytes / ms / 1e6, 1),
        "mode": mode,
    }


# ---------------------------------------------------------------- the operations


class Operation:
    """Something done to one layer's cache; calling it does all layers."""

    kv: list[Any]

    def layer(self, i: int) -> torch.Tensor | None:
        raise NotImplementedError

    def __call__(self) -> None:
        for i in range(len(self.kv)):
            self.layer(i)


class TritonDecode(Operation):
    SPLITS = 8

    def __init__(self, bench: Bench, slots: torch.Tensor, layout: str, ps: int) -> None:
        sizes = bench.sizes
        b, ctx = self.shape = slots.shape
        self.sglang, self.ps, self.kv = bench.sglang, ps, bench.arena.views(layout)
        self.scale = sizes.head_dim**-0.5
        self.q = noise(b, sizes.q_heads, sizes.head_dim)
        self.o = torch.empty_like(self.q)
        self.indptr = int32_steps(b, ctx)
        self.indices = slots.reshape(-1).to(torch.int64)
        partial = (b, sizes.q_heads, self.SPLITS)
        self.logits = torch.empty(*partial, sizes.head_dim, dtype=torch.float32, device=DEVICE)
        self.lse = torch.empty(*partial, dtype=torch.float32, device=DEVICE)
        self.splits = torch.empty(b, dtype=torch.int32, device=DEVICE)
        self._choose_splits(sizes.q_heads, sizes.kv_heads, bench.multiprocessors)

    def _choose_splits(self, q_heads: int, kv_heads: int, sms: int) -> None:
        b, ctx = self.shape
        lens = torch.full((b,), ctx, dtype=torch.int64, device=DEVICE)
        try:
            self.sglang["metadata"].get_num_kv_splits_triton[(1,)](
                self.splits, lens, b, 1, q_heads, kv_heads, self.SPLITS, sms, MAX_NUM_SEQ=256
            )
        except Exception:
            self.splits.fill_(self.SPLITS)

    def slots(self) -> torch.Tensor:
        return self.indices.view(self.shape)

    def layer(self, i: int) -> torch.Tensor:
        k, v = self.kv[i]
        self.sglang["decode_attention"].decode_attention_fwd(
            self.q,
            k,
            v,
            self.o,
            self.indptr,
            self.indices,
            self.logits,
            self.lse,
            self.splits,
            self.SPLITS,
            self.scale,
            1.0,
            1.0,
            page_size=self.ps,
        )
        return self.o


class FA3Decode(Operation):
    """The last `q_len` tokens of each request attend to all of it."""

    def __init__(
        self, bench: Bench, slots: torch.Tensor, layout: str, ps: int, q_len: int = 1
    ) -> None:
        sizes = bench.sizes
        b, ctx = self.shape = slots.shape
        self.fa3, self.ps, self.q_len = bench.fa3, ps, q_len
        self.kv = [tuple(self._paged(x) for x in kv) for kv in bench.arena.views(layout)]
        self.scale = sizes.head_dim**-0.5
        self.q = noise(b * q_len, sizes.q_heads, sizes.head_dim)
        self.o = torch.empty_like(self.q)
        self.cu = int32_steps(b, q_len)
        self.used = torch.full((b,), ctx, dtype=torch.int32, device=DEVICE)
        self.table = (slots[:, ::ps] // ps).to(torch.int32).contiguous()

    def _paged(self, x: torch.Tensor) -> torch.Tensor:
        """[pages, ps, H, D] of a view: SGLang's view(-1, page_size, H, D)."""
        return x if x.dim() == 4 else x.view(-1, self.ps, *x.shape[1:])

    def slots(self) -> torch.Tensor:
        b, ctx = self.shape
        slots = self.table.long()[:, :, None] * self.ps + torch.arange(self.ps, device=DEVICE)
        return slots.view(b, -1)[:, :ctx]

    def layer(self, i: int) -> torch.Tensor:
        k, v = self.kv[i]
        self.fa3(
            q=self.q,
            k=k,
            v=v,
            out=self.o,
            cu_seqlens_q=self.cu,
            max_seqlen_q=self.q_len,
            seqused_k=self.used,
            max_seqlen_k=self.shape[1],
            softmax_scale=self.scale,
            causal=True,
            block_table=self.table,
            fa_version=3,
        )
        return self.o


class TritonExtend(Operation):
    """Prefix in the cache, the new tokens from their own tensors, as SGLang's Triton backend."""

    def __init__(self, bench: Bench, slots: torch.Tensor, layout: str, ps: int, q_len: int) -> None:
        sizes = bench.sizes
        b, prefix = slots.shape
        self.sglang, self.ps, self.q_len = bench.sglang, ps, q_len
        self.kv = bench.arena.views(layout)
        self.q = noise(b * q_len, sizes.q_heads, sizes.head_dim)
        self.k = noise(b * q_len, sizes.kv_heads, sizes.head_dim)
        self.v = noise(b * q_len, sizes.kv_heads, sizes.head_dim)
        self.o = torch.empty_like(self.q)
        self.qo = int32_steps(b, q_len).to(torch.int64)
        self.indptr = int32_steps(b, prefix)
        self.indices = slots.reshape(-1).to(torch.int64)

    def layer(self, i: int) -> torch.Tensor:
        k, v = self.kv[i]
        self.sglang["extend_attention"].extend_attention_fwd(
            self.q,
            self.k,
            self.v,
            self.o,
            k,
            v,
            self.qo,
            self.indptr,
            self.indices,
            None,
            True,
            None,
            self.q_len,
            1.0,
            1.0,
            page_size=self.ps,
        )
        return self.o


class Store(Operation):
    """New K and V into their slots, by the Triton kernel above or by torch's indexing."""

    def __init__(self, bench: Bench, slots: torch.Tensor, layout: str, how: str) -> None:
        sizes = bench.sizes
        self.kv = bench.arena.views(layout)
        self.loc = slots.reshape(-1).to(torch.int64)
        self.k = noise(self.loc.numel(), sizes.kv_heads, sizes.head_dim)
        self.v = noise(self.loc.numel(), sizes.kv_heads, sizes.head_dim)
        self.row, self.how = sizes.row, how

    def layer(self, i: int) -> None:
        if self.how == "triton":
            self._triton(*self.kv[i])
        else:
            self._index_put(*self.kv[i])

    def _index_put(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if k.dim() == 4:
            page, tok = self.loc // k.shape[1], self.loc % k.shape[1]
            k[page, tok] = self.k
            v[page, tok] = self.v
        else:
            k[self.loc] = self.k
            v[self.loc] = self.v

    def _triton(self, k: torch.Tensor, v: torch.Tensor) -> None:
        paged = k.dim() == 4
        store_rows[(self.loc.numel(), 2)](
            k,
            v,
            self.k,
            self.v,
            self.loc,
            k.stride(0),
            k.stride(1) if paged else 0,
            v.stride(0),
            v.stride(1) if paged else 0,
            self.k.stride(0),
            PAGE=k.shape[1] if paged else 1,
            ROW=self.row,
            BLOCK=triton.next_power_of_2(self.row),
            num_warps=4,
        )


class MLADecode(Operation):
    """Triton MLA decode, page size 1."""

    SPLITS = 8

    def __init__(self, bench: Bench, case: Case) -> None:
        b, ctx = case.batch, case.ctx
        slots = place(bench.arena.mla_slots, b, ctx, case.placement)
        self.sglang, self.kv = bench.sglang, bench.arena.mla_views(case.layout)
        self.indices = slots.reshape(-1).to(torch.int64)
        self.q = noise(b, MLA_HEADS, MLA_ROW)
        self.o = torch.empty(b, MLA_HEADS, MLA_VALUE, device=DEVICE, dtype=DTYPE)
        self.indptr = int32_steps(b, ctx)
        partial = (b, MLA_HEADS, self.SPLITS)
        self.logits = torch.empty(*partial, MLA_VALUE, dtype=torch.float32, device=DEVICE)
        self.lse = torch.empty(*partial, dtype=torch.float32, device=DEVICE)
        self.splits = torch.full((b,), self.SPLITS, dtype=torch.int32, device=DEVICE)

    def layer(self, i: int) -> torch.Tensor:
        k = self.kv[i]
        self.sglang["decode_attention"].decode_attention_fwd(
            self.q,
            k,
            k[..., :MLA_VALUE],
            self.o,
            self.indptr,
            self.indices,
            self.logits,
            self.lse,
            self.splits,
            self.SPLITS,
            MLA_ROW**-0.5,
            1.0,
            1.0,
            has_mla=True,
            page_size=1,
        )
        return self.o


DECODE = {"triton": TritonDecode, "fa3": FA3Decode}


# ---------------------------------------------------------------- check


def check_cases(bench: Bench) -> Iterator[Case]:
    for layout, ps in LAYOUT_PS:
        for kernel in bench.kernels:
            yield Case("check", kernel, layout, ps)


def build_check(bench: Bench, case: Case) -> Operation:
    slots = bench.arena.place(*CHECK, f"shuf{case.ps}")
    return DECODE[case.kernel](bench, slots, case.layout, case.ps)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, HQ, D], k and v [B, ctx, HK, D]: decode attention in float32."""
    repeats = q.shape[1] // k.shape[2]
    k = k.float().repeat_interleave(repeats, dim=2)
    v = v.float().repeat_interleave(repeats, dim=2)
    s = torch.einsum("bhd,bchd->bhc", q.float(), k) * q.shape[-1] ** -0.5
    return torch.einsum("bhc,bchd->bhd", s.softmax(-1), v)


def measure_check(bench: Bench, case: Case, op: TritonDecode | FA3Decode) -> Row:
    """Store K and V into the first and the last layer, attend, compare."""
    worst = 0.0
    slots = op.slots()
    shape = (*CHECK, bench.sizes.kv_heads, bench.sizes.head_dim)
    for i in sorted({0, bench.sizes.layers - 1}):
        store = Store(bench, slots, case.layout, "triton" if i else "index_put")
        store.layer(i)
        got = op.layer(i).float()
        expected = reference(op.q, store.k.view(shape), store.v.view(shape))
        worst = max(worst, (got.view_as(expected) - expected).abs().max().item())
    return {"max_abs_err": round(worst, 5), "ok": worst < 0.02}


# ---------------------------------------------------------------- store


def store_cases(bench: Bench) -> Iterator[Case]:
    for tokens in bench.sizes.store:
        for how in ("triton", "index_put"):
            for layout, ps in STORE_LAYOUT_PS:
                for placement in ("seq", f"shuf{ps}"):
                    yield Case("store", how, layout, ps, placement, tokens=tokens)


def build_store(bench: Bench, case: Case) -> Operation:
    slots = bench.arena.place(1, case.tokens, case.placement)
    return Store(bench, slots, case.layout, case.kernel)


def measure_store(bench: Bench, case: Case, op: Operation) -> Row:
    return rates(bench, op, case.tokens * bench.sizes.slot * ITEM)


# ---------------------------------------------------------------- extend


def extend_cases(bench: Bench) -> Iterator[Case]:
    batch, prefix, q = bench.sizes.extend
    for kernel in bench.kernels:
        for layout, ps in LAYOUT_PS:
            for placement in placements(ps):
                if (layout, ps, placement) != ("L", 1, "shuf16"):
                    yield Case(
                        "extend", kernel, layout, ps, placement, batch=batch, ctx=prefix, q=q
                    )


def build_extend(bench: Bench, case: Case) -> Operation:
    if case.kernel == "fa3":
        slots = bench.arena.place(case.batch, case.ctx + case.q, case.placement)
        return FA3Decode(bench, slots, case.layout, case.ps, case.q)
    slots = bench.arena.place(case.batch, case.ctx, case.placement)
    return TritonExtend(bench, slots, case.layout, case.ps, case.q)


def measure_extend(bench: Bench, case: Case, op: Operation) -> Row:
    sizes = bench.sizes
    ms, mode = timed(op, bench.reps)
    pairs = case.batch * case.q * (case.ctx + case.q / 2)
    flop = 4 * sizes.q_heads * sizes.head_dim * pairs * sizes.layers
    return {"ms_32_layers": round(ms, 3), "tflops": round(flop / ms / 1e9, 1), "mode": mode}


# ---------------------------------------------------------------- decode


def decode_cases(bench: Bench) -> Iterator[Case]:
    for batch, ctx in bench.sizes.decode:
        if batch * ctx > bench.arena.slots:
            continue
        for kernel in bench.kernels:
            for layout, ps in LAYOUT_PS:
                for placement in placements(ps):
                    yield Case("decode", kernel, layout, ps, placement, batch=batch, ctx=ctx)


def build_decode(bench: Bench, case: Case) -> Operation:
    slots = bench.arena.place(case.batch, case.ctx, case.placement)
    return DECODE[case.kernel](bench, slots, case.layout, case.ps)


def measure_decode(bench: Bench, case: Case, op: Operation) -> Row:
    return rates(bench, op, case.batch * case.ctx * bench.sizes.slot * ITEM)


# ---------------------------------------------------------------- mla


def mla_cases(bench: Bench) -> Iterator[Case]:
    if not bench.sglang:
        return
    for layout in ("L", "T"):
        for batch, ctx in bench.sizes.mla_decode:
            for placement in ("seq", "shuf1", "shuf64"):
                yield Case("mla", "triton", layout, 1, placement, batch=batch, ctx=ctx)


def measure_mla(bench: Bench, case: Case, op: Operation) -> Row:
    return rates(bench, op, case.batch * case.ctx * MLA_ROW * ITEM * bench.sizes.mla_layers)


# ---------------------------------------------------------------- tables


def ratio_base(op: str, who: tuple[str, str, int, str]) -> tuple[str, str, int, str]:
    """The per-layer case that `who` is compared with."""
    kernel, layout, ps, placement = who
    if op == "store" and layout != "L":
        return kernel, "L", 1, "seq" if placement == "seq" else "shuf1"
    return kernel, "L", ps, placement


def cell(value: float | None, base: float | None, higher_is_better: bool) -> str:
    if value is None:
        return f"{'-':>18}"
    if not base:
        return f"{value:>18.1f}"
    ratio = value / base if higher_is_better else base / value
    return f"{value:>11.1f} {ratio:5.2f}x"


def print_table(
    report: Report, op: str, field: str, key: Callable[[Row], Any], higher_is_better: bool
) -> None:
    rows = [row for row in report.rows if row.get("op") == op and field in row]
    if not rows:
        return
    cols = sorted({key(row) for row in rows})
    values: dict[Any, dict[Any, float]] = {}  # By case, then by column.
    for row in rows:
        who = (row["kernel"], row["layout"], row["ps"], row["placement"])
        values.setdefault(who, {})[key(row)] = row[field]
    note = "ratio to per-layer at the same page size and placement; > 1 is faster"
    print(f"\n== {op}: {field} ({note})")
    heads = " ".join(f"{col!s:>18}" for col in cols)
    print(f"{'kernel':9} {'layout':6} {'ps':>4} {'placement':9} {heads}")
    for who, mine in values.items():
        base = values.get(ratio_base(op, who), {})
        cells = " ".join(cell(mine.get(col), base.get(col), higher_is_better) for col in cols)
        kernel, layout, ps, placement = who
        print(f"{kernel:9} {layout:6} {ps:>4} {placement:9} {cells}")


def print_summary(report: Report) -> None:
    print_table(report, "decode", "gbs", lambda r: (r["batch"], r["ctx"]), True)
    print_table(report, "extend", "ms_32_layers", lambda r: (r["batch"], r["ctx"], r["q"]), False)
    print_table(report, "store", "us_per_layer", lambda r: r["tokens"], False)
    print_table(report, "mla", "gbs", lambda r: (r["batch"], r["ctx"]), True)
    bad = [row for row in report.rows if "error" in row or row.get("ok") is False]
    print(f"\n{len(report.rows)} rows, {len(bad)} failed or wrong, {report.elapsed():.0f} s")
    for row in bad[:20]:
        print(json.dumps(row))


# ---------------------------------------------------------------- what runs

PARTS = {
    "check": (check_cases, build_check, measure_check),
    "store": (store_cases, build_store, measure_store),
    "extend": (extend_cases, build_extend, measure_extend),
    "decode": (decode_cases, build_decode, measure_decode),
    "mla": (mla_cases, MLADecode, measure_mla),
}


def make_bench(args: argparse.Namespace, report: Report) -> Bench:
    tiny = args.tiny or not CUDA
    sizes = TINY if tiny else FULL
    sms = torch.cuda.get_device_properties(0).multi_processor_count if CUDA else 132
    sglang = fa3 = None
    if not args.no_triton:
        sglang = report.attempt(
            lambda: load_sglang_kernels(Path(args.sglang_root)), "sglang kernels do not import"
        )
    if CUDA and not args.no_fa3:
        fa3 = report.attempt(load_fa3, "FA3 does not import")
    arena = Arena(sizes, TINY_SLOTS if tiny else fitting_slots(sizes, args.max_gib))
    return Bench(report, sizes, args.reps, arena, sms, sglang, fa3)


def emit_setup(bench: Bench) -> None:
    bench.report.emit(
        {
            "device": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "slots": bench.arena.slots,
            "arena_gib": round(bench.arena.memory.numel() * ITEM / GIB, 2),
            "fa3": bench.fa3 is not None,
            "sglang": bench.sglang is not None,
            "setup_s": round(bench.report.elapsed(), 1),
        }
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sglang-root", required=True, help="folder that holds sglang/")
    parser.add_argument("--max-gib", type=float, default=40.0)
    parser.add_argument("--budget-s", type=float, default=140.0)
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--out", default=None, help="also write the JSON lines here")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes; runs on the CPU with TRITON_INTERPRET=1"
    )
    parser.add_argument("--no-fa3", action="store_true")
    parser.add_argument("--no-triton", action="store_true")
    parser.add_argument("--only", default="", help="comma list of: check,store,extend,decode,mla")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    only = set(filter(None, args.only.split(",")))
    torch.manual_seed(0)
    with Path(args.out).open("w") if args.out else contextlib.nullcontext() as out:
        report = Report(args.budget_s, out)
        bench = make_bench(args, report)
        if CUDA:
            emit_setup(bench)
        for part, (cases, build, measure) in PARTS.items():
            if not only or part in only:
                for case in cases(bench):
                    bench.run(case, build, measure)
        print_summary(report)


if __name__ == "__main__":
    main()
