# SPDX-License-Identifier: Apache-2.0
"""Attention speed of KV-cache layouts: per layer, token-major and page-major.

Needs a Hopper GPU, torch and triton, and vLLM's FlashAttention 3 where it imports. The Triton kernels
are SGLang's own, loaded from the folder that holds `sglang/` without importing the package. One JSON
line per case, a table at the end.

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
import random
import statistics
import sys
import time
import traceback
import types
from pathlib import Path

T0 = time.monotonic()
ap = argparse.ArgumentParser()
ap.add_argument("--sglang-root", required=True, help="folder that holds sglang/")
ap.add_argument("--max-gib", type=float, default=40.0)
ap.add_argument("--budget-s", type=float, default=140.0)
ap.add_argument("--reps", type=int, default=20)
ap.add_argument("--out", default=None, help="also write the JSON lines here")
ap.add_argument(
    "--tiny", action="store_true", help="tiny sizes; runs on the CPU with TRITON_INTERPRET=1"
)
ap.add_argument("--no-fa3", action="store_true")
ap.add_argument("--no-triton", action="store_true")
ap.add_argument("--only", default="", help="comma list of: check,store,extend,decode,mla")
args = ap.parse_args()
ONLY = set(filter(None, args.only.split(",")))

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

CUDA = torch.cuda.is_available()
DEV = "cuda" if CUDA else "cpu"
TINY = args.tiny or not CUDA
DT = torch.bfloat16 if CUDA else torch.float16
L, HK, HQ, D = (2, 2, 8, 64) if TINY else (32, 8, 32, 128)
ROW = HK * D
ISZ = 2
SLOT_ELEMS = L * 2 * ROW
SM = torch.cuda.get_device_properties(0).multi_processor_count if CUDA else 132
random.seed(0)
torch.manual_seed(0)
OUT = open(args.out, "w") if args.out else None
RESULTS = []


def emit(row):
    line = json.dumps(row)
    print(line, flush=True)
    if OUT:
        OUT.write(line + "\n")
        OUT.flush()
    RESULTS.append(row)


def left():
    return args.budget_s - (time.monotonic() - T0)


# ---------------------------------------------------------------- SGLang's kernels, without SGLang


def _pkg(name):
    module = types.ModuleType(name)
    module.__path__ = []
    sys.modules[name] = module
    return module


def load_sglang_kernels(root):
    root = Path(root)
    sub = root / "sglang/srt/layers/attention/triton_ops"
    folder = sub if sub.is_dir() else root
    base = "sglang.srt.layers.attention.triton_ops"
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.attention", base):
        _pkg(name)
    utils = _pkg("sglang.srt.utils")
    utils.is_hip = lambda: False
    utils.is_cuda = lambda: CUDA
    utils.is_gfx95_supported = lambda: False
    loaded = {}
    for name in ("prefill_attention", "decode_attention", "extend_attention", "metadata"):
        full = f"{base}.{name}"
        spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
        loaded[name] = module
    return loaded


SGL = None
if not args.no_triton:
    try:
        SGL = load_sglang_kernels(args.sglang_root)
    except Exception:
        emit({"error": "sglang kernels do not import", "trace": traceback.format_exc()[-800:]})

FA3 = None
if CUDA and not args.no_fa3:
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        FA3 = flash_attn_varlen_func
    except Exception:
        try:
            from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

            FA3 = flash_attn_varlen_func
        except Exception:
            emit({"error": "FA3 does not import", "trace": traceback.format_exc()[-800:]})


@triton.jit
def store_rows(
    k_dst, v_dst, k_src, v_src, loc_ptr, k_page, k_tok, v_page, v_tok, src_row,
    PAGE: tl.constexpr, ROW_: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program copies the row of one token of K or of V, as SGLang's CUDA store does."""
    pid = tl.program_id(0)
    loc = tl.load(loc_ptr + pid).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < ROW_
    src = pid.to(tl.int64) * src_row + offs
    if tl.program_id(1) == 0:
        at = (loc // PAGE) * k_page + (loc % PAGE) * k_tok
        tl.store(k_dst + at + offs, tl.load(k_src + src, mask=mask), mask=mask)
    else:
        at = (loc // PAGE) * v_page + (loc % PAGE) * v_tok
        tl.store(v_dst + at + offs, tl.load(v_src + src, mask=mask), mask=mask)


# ---------------------------------------------------------------- arena, views, placements

GIB = 1 << 30
if TINY:
    SLOTS = 4096
else:
    free = torch.cuda.mem_get_info()[0]
    want = min(args.max_gib * GIB, free - 6 * GIB)
    SLOTS = int(want // (SLOT_ELEMS * ISZ)) // 128 * 128
ARENA = torch.empty(SLOTS * SLOT_ELEMS, dtype=DT, device=DEV)
_chunk = min(ARENA.numel(), 32 << 20)
_noise = torch.randn(_chunk, device=DEV).to(DT)
for _at in range(0, ARENA.numel(), _chunk):
    _n = min(_chunk, ARENA.numel() - _at)
    ARENA[_at : _at + _n].copy_(_noise[:_n])
del _noise


def views(layout):
    """K and V of every layer, as the pool of that layout would hold them."""
    if layout == "L":
        a = ARENA.view(L, 2, SLOTS, HK, D)
        return [(a[i, 0], a[i, 1]) for i in range(L)]
    if layout == "T":
        a = ARENA.view(SLOTS, L, 2, HK, D)
        return [(a[:, i, 0], a[:, i, 1]) for i in range(L)]
    n = int(layout[1:])
    a = ARENA.view(SLOTS // n, L, 2, n, HK, D)
    return [(a[:, i, 0], a[:, i, 1]) for i in range(L)]


def paged(kv, ps):
    """[pages, ps, H, D] of a view: SGLang's view(-1, page_size, H, D)."""
    return [x if x.dim() == 4 else x.view(-1, ps, HK, D) for x in kv]


VIEWS = {}


def place(batch, ctx, placement):
    """[batch, ctx] slots."""
    if placement == "seq":
        return torch.arange(batch * ctx, device=DEV).view(batch, ctx)
    g = int(placement[4:])
    per = -(-ctx // g)
    groups = torch.randperm(SLOTS // g, device=DEV)[: batch * per]
    slots = (groups[:, None] * g + torch.arange(g, device=DEV)).view(batch, per * g)
    return slots[:, :ctx].contiguous()


def timed(fn, reps=None):
    """Median milliseconds of a CUDA graph of fn."""
    reps = reps or args.reps
    if not CUDA:
        t = time.perf_counter()
        fn()
        return (time.perf_counter() - t) * 1e3, "cpu"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    how = "graph"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
        call = graph.replay
    except Exception:
        torch.cuda.synchronize()
        how, call = "events", fn
    for _ in range(3):
        call()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(reps)
    ]
    for a, b in pairs:
        a.record()
        call()
        b.record()
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in pairs)
    return ms, how


# ---------------------------------------------------------------- the operations


class TritonDecode:
    SPLITS = 8

    def __init__(self, slots, ps, layer_kv, heads=None):
        self.b, self.ctx = slots.shape
        self.ps, self.kv = ps, layer_kv
        b = self.b
        self.q = torch.randn(b, HQ, D, device=DEV).to(DT)
        self.o = torch.empty_like(self.q)
        self.indptr = (torch.arange(b + 1, device=DEV) * self.ctx).to(torch.int32)
        self.indices = slots.reshape(-1).to(torch.int64)
        self.logits = torch.empty(b, HQ, self.SPLITS, D, dtype=torch.float32, device=DEV)
        self.lse = torch.empty(b, HQ, self.SPLITS, dtype=torch.float32, device=DEV)
        self.splits = torch.empty(b, dtype=torch.int32, device=DEV)
        lens = torch.full((b,), self.ctx, dtype=torch.int64, device=DEV)
        try:
            SGL["metadata"].get_num_kv_splits_triton[(1,)](
                self.splits, lens, b, 1, HQ, HK, self.SPLITS, SM, MAX_NUM_SEQ=256
            )
        except Exception:
            self.splits.fill_(self.SPLITS)

    def layer(self, i):
        k, v = self.kv[i]
        SGL["decode_attention"].decode_attention_fwd(
            self.q, k, v, self.o, self.indptr, self.indices, self.logits, self.lse, self.splits,
            self.SPLITS, D**-0.5, 1.0, 1.0, page_size=self.ps,
        )  # fmt: skip
        return self.o

    def __call__(self):
        for i in range(L):
            self.layer(i)


class FA3Decode:
    def __init__(self, slots, ps, layer_kv, q_len=1):
        self.b, self.ctx = slots.shape
        self.kv = [paged(kv, ps) for kv in layer_kv]
        self.q_len = q_len
        self.q = torch.randn(self.b * q_len, HQ, D, device=DEV).to(DT)
        self.o = torch.empty_like(self.q)
        self.cu = (torch.arange(self.b + 1, device=DEV) * q_len).to(torch.int32)
        self.used = torch.full((self.b,), self.ctx, dtype=torch.int32, device=DEV)
        self.table = (slots[:, ::ps] // ps).to(torch.int32).contiguous()

    def layer(self, i):
        k, v = self.kv[i]
        FA3(
            q=self.q, k=k, v=v, out=self.o, cu_seqlens_q=self.cu, max_seqlen_q=self.q_len,
            seqused_k=self.used, max_seqlen_k=self.ctx, softmax_scale=D**-0.5, causal=True,
            block_table=self.table, fa_version=3,
        )  # fmt: skip
        return self.o

    def __call__(self):
        for i in range(L):
            self.layer(i)


class TritonExtend:
    """Prefix in the cache, the new tokens from their own tensors, as SGLang's Triton backend."""

    def __init__(self, slots, ps, layer_kv, q_len):
        self.b, self.ctx = slots.shape  # The prefix.
        self.ps, self.kv, self.q_len = ps, layer_kv, q_len
        n = self.b * q_len
        self.q = torch.randn(n, HQ, D, device=DEV).to(DT)
        self.k = torch.randn(n, HK, D, device=DEV).to(DT)
        self.v = torch.randn(n, HK, D, device=DEV).to(DT)
        self.o = torch.empty_like(self.q)
        self.qo = (torch.arange(self.b + 1, device=DEV) * q_len).to(torch.int64)
        self.indptr = (torch.arange(self.b + 1, device=DEV) * self.ctx).to(torch.int32)
        self.indices = slots.reshape(-1).to(torch.int64)

    def layer(self, i):
        k, v = self.kv[i]
        SGL["extend_attention"].extend_attention_fwd(
            self.q, self.k, self.v, self.o, k, v, self.qo, self.indptr, self.indices, None, True,
            None, self.q_len, 1.0, 1.0, page_size=self.ps,
        )  # fmt: skip
        return self.o

    def __call__(self):
        for i in range(L):
            self.layer(i)


class Store:
    def __init__(self, slots, layer_kv, how):
        self.kv, self.how = layer_kv, how
        self.loc = slots.reshape(-1).to(torch.int64)
        n = self.loc.numel()
        self.k = torch.randn(n, HK, D, device=DEV).to(DT)
        self.v = torch.randn(n, HK, D, device=DEV).to(DT)

    def layer(self, i, k_src=None, v_src=None):
        k, v = self.kv[i]
        ks, vs = (self.k, self.v) if k_src is None else (k_src, v_src)
        four = k.dim() == 4
        if self.how == "index_put":
            if four:
                page, tok = self.loc // k.shape[1], self.loc % k.shape[1]
                k[page, tok] = ks
                v[page, tok] = vs
            else:
                k[self.loc] = ks
                v[self.loc] = vs
            return
        page = k.shape[1] if four else 1
        sk = (k.stride(0), k.stride(1)) if four else (k.stride(0), 0)
        sv = (v.stride(0), v.stride(1)) if four else (v.stride(0), 0)
        store_rows[(self.loc.numel(), 2)](
            k, v, ks, vs, self.loc, *sk, *sv, ks.stride(0),
            PAGE=page, ROW_=ROW, BLOCK=triton.next_power_of_2(ROW), num_warps=4,
        )  # fmt: skip

    def __call__(self):
        for i in range(L):
            self.layer(i)


# ---------------------------------------------------------------- what runs

LAYOUT_PS = [("L", 1), ("T", 1), ("L", 16), ("T", 16), ("P16", 16), ("L", 64), ("T", 64), ("P64", 64), ("L", 128), ("T", 128), ("P128", 128)]  # fmt: skip
if TINY:
    SHAPES = [(2, 256)]
    EXTEND = (2, 256, 32)
    STORE = [16]
else:
    SHAPES = [(8, 1024), (1, 8192), (1, 1024), (64, 1024), (8, 8192), (32, 8192), (256, 1024)]
    EXTEND = (4, 4096, 512)
    STORE = [256, 8192]
SHAPES = [s for s in SHAPES if s[0] * s[1] <= SLOTS]


def placements(ps):
    return ["seq", "shuf1", "shuf16"] if ps == 1 else ["seq", f"shuf{ps}"]


def get_views(layout):
    if layout not in VIEWS:
        VIEWS[layout] = views(layout)
    return VIEWS[layout]


def case(row, build, measure):
    """Run one case; a failure is a row, not the end."""
    if left() < 4:
        emit({**row, "error": "out of time"})
        return
    try:
        op = build()
        emit({**row, **measure(op)})
    except Exception as e:
        emit({**row, "error": f"{type(e).__name__}: {str(e)[:300]}"})
        with contextlib.suppress(Exception):
            torch.cuda.synchronize() if CUDA else None
    finally:
        op = None


def reference(q, k, v):
    """q [B, HQ, D], k and v [B, ctx, HK, D]: decode attention in float32."""
    k = k.float().repeat_interleave(HQ // HK, dim=2)
    v = v.float().repeat_interleave(HQ // HK, dim=2)
    s = torch.einsum("bhd,bchd->bhc", q.float(), k) * D**-0.5
    return torch.einsum("bhc,bchd->bhd", s.softmax(-1), v)


def want(part):
    return not ONLY or part in ONLY


if CUDA:
    emit({"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "triton": triton.__version__, "slots": SLOTS, "arena_gib": round(ARENA.numel() * ISZ / GIB, 2), "fa3": FA3 is not None, "sglang": SGL is not None, "setup_s": round(time.monotonic() - T0, 1)})  # fmt: skip

KERNELS = ([("triton", TritonDecode)] if SGL else []) + ([("fa3", FA3Decode)] if FA3 else [])

if want("check"):
    b, ctx = 3, 176
    for layout, ps in LAYOUT_PS:
        for name, cls in KERNELS:

            def build(layout=layout, ps=ps, cls=cls):
                return cls(place(b, ctx, f"shuf{ps}"), ps, get_views(layout))

            def measure(op, layout=layout, ps=ps):
                worst = 0.0
                slots = (
                    op.indices.view(b, ctx)
                    if hasattr(op, "indices")
                    else (op.table.long()[:, :, None] * ps + torch.arange(ps, device=DEV)).view(
                        b, -1
                    )[:, :ctx]
                )
                for i in sorted({0, L - 1}):
                    st = Store(slots, get_views(layout), "triton" if i else "index_put")
                    st.layer(i)
                    got = op.layer(i).float()
                    ref = reference(op.q, st.k.view(b, ctx, HK, D), st.v.view(b, ctx, HK, D))
                    worst = max(worst, (got.view_as(ref) - ref).abs().max().item())
                return {"max_abs_err": round(worst, 5), "ok": worst < 0.02}

            case({"op": "check", "kernel": name, "layout": layout, "ps": ps}, build, measure)

if want("store"):
    for n in STORE:
        for how in ("triton", "index_put"):
            for layout, ps in [("L", 1), ("T", 1), ("P16", 16), ("P64", 64), ("P128", 128)]:
                for placement in ("seq", f"shuf{ps}"):

                    def build(n=n, how=how, layout=layout, placement=placement):
                        return Store(place(1, n, placement), get_views(layout), how)

                    def measure(op, n=n):
                        ms, mode = timed(op)
                        return {"us_per_layer": round(ms * 1e3 / L, 2), "gbs": round(n * 2 * ROW * ISZ * L / ms / 1e6, 1), "mode": mode}  # fmt: skip

                    case({"op": "store", "kernel": how, "layout": layout, "ps": ps, "placement": placement, "tokens": n}, build, measure)  # fmt: skip

if want("extend"):
    b, prefix, q_len = EXTEND
    for name in [k for k, _ in KERNELS]:
        for layout, ps in LAYOUT_PS:
            for placement in placements(ps):
                if placement == "shuf16" and ps == 1 and layout == "L":
                    continue

                def build(name=name, layout=layout, ps=ps, placement=placement):
                    if name == "fa3":
                        return FA3Decode(
                            place(b, prefix + q_len, placement), ps, get_views(layout), q_len
                        )
                    return TritonExtend(place(b, prefix, placement), ps, get_views(layout), q_len)

                def measure(op):
                    ms, mode = timed(op)
                    flop = 4 * HQ * D * b * q_len * (prefix + q_len / 2) * L
                    return {
                        "ms_32_layers": round(ms, 3),
                        "tflops": round(flop / ms / 1e9, 1),
                        "mode": mode,
                    }

                case({"op": "extend", "kernel": name, "layout": layout, "ps": ps, "placement": placement, "batch": b, "ctx": prefix, "q": q_len}, build, measure)  # fmt: skip

if want("decode"):
    for batch, ctx in SHAPES:
        for name, cls in KERNELS:
            for layout, ps in LAYOUT_PS:
                for placement in placements(ps):

                    def build(
                        cls=cls, layout=layout, ps=ps, placement=placement, batch=batch, ctx=ctx
                    ):
                        return cls(place(batch, ctx, placement), ps, get_views(layout))

                    def measure(op, batch=batch, ctx=ctx):
                        ms, mode = timed(op)
                        size = batch * ctx * 2 * ROW * ISZ * L
                        return {"us_per_layer": round(ms * 1e3 / L, 2), "gbs": round(size / ms / 1e6, 1), "mode": mode}  # fmt: skip

                    case({"op": "decode", "kernel": name, "layout": layout, "ps": ps, "placement": placement, "batch": batch, "ctx": ctx}, build, measure)  # fmt: skip

if want("mla") and SGL:
    # DeepSeek-V2-Lite-like: 27 layers, 16 heads, rows of 576. Triton MLA decode, page size 1.
    ML, MH, MD, MV = (2, 16, 576, 512) if TINY else (27, 16, 576, 512)
    MS = min(SLOTS * SLOT_ELEMS // (ML * MD), 1 << 20)
    MA = ARENA[: MS * ML * MD]
    for layout in ("L", "T"):
        kv = [MA.view(ML, MS, 1, MD)[i] for i in range(ML)] if layout == "L" else [MA.view(MS, ML, 1, MD)[:, i] for i in range(ML)]  # fmt: skip
        for batch, ctx in [(2, 256)] if TINY else [(8, 8192), (64, 1024)]:
            for placement in ("seq", "shuf1", "shuf64"):

                class MLADecode:
                    def __init__(self, batch=batch, ctx=ctx, placement=placement, kv=kv):
                        s = 8
                        if placement == "seq":
                            slots = torch.arange(batch * ctx, device=DEV)
                        else:
                            g = int(placement[4:])
                            slots = torch.randperm(MS // g, device=DEV)[: batch * ctx // g]
                            slots = (slots[:, None] * g + torch.arange(g, device=DEV)).reshape(-1)
                        self.idx = slots.to(torch.int64)
                        self.q = torch.randn(batch, MH, MD, device=DEV).to(DT)
                        self.o = torch.empty(batch, MH, MV, device=DEV, dtype=DT)
                        self.ptr = (torch.arange(batch + 1, device=DEV) * ctx).to(torch.int32)
                        self.lg = torch.empty(batch, MH, s, MV, dtype=torch.float32, device=DEV)
                        self.lse = torch.empty(batch, MH, s, dtype=torch.float32, device=DEV)
                        self.sp = torch.full((batch,), s, dtype=torch.int32, device=DEV)
                        self.kv = kv

                    def __call__(self):
                        for k in self.kv:
                            SGL["decode_attention"].decode_attention_fwd(
                                self.q, k, k[..., :MV], self.o, self.ptr, self.idx, self.lg, self.lse, self.sp, 8,
                                MD**-0.5, 1.0, 1.0, has_mla=True, page_size=1,
                            )  # fmt: skip

                def measure(op, batch=batch, ctx=ctx):
                    ms, mode = timed(op)
                    return {"us_per_layer": round(ms * 1e3 / ML, 2), "gbs": round(batch * ctx * MD * ISZ * ML / ms / 1e6, 1), "mode": mode}  # fmt: skip

                case({"op": "mla", "kernel": "triton", "layout": layout, "ps": 1, "placement": placement, "batch": batch, "ctx": ctx}, MLADecode, measure)  # fmt: skip


# ---------------------------------------------------------------- tables


def table(op, field, key, higher_is_better):
    rows = [r for r in RESULTS if r.get("op") == op and field in r]
    if not rows:
        return
    cols = sorted({key(r) for r in rows})
    best = {(r["kernel"], r["layout"], r["ps"], r["placement"], key(r)): r[field] for r in rows}
    print(
        f"\n== {op}: {field} (ratio to per-layer at the same page size and placement; > 1 is faster)"
    )
    print(
        f"{'kernel':9} {'layout':6} {'ps':>4} {'placement':9} "
        + " ".join(f"{c!s:>18}" for c in cols)
    )
    seen = []
    for r in rows:
        who = (r["kernel"], r["layout"], r["ps"], r["placement"])
        if who not in seen:
            seen.append(who)
    for who in seen:
        cells = []
        for c in cols:
            value = best.get((*who, c))
            base = best.get((who[0], "L", who[2], who[3], c))
            if op == "store" and who[1] != "L":
                base = best.get((who[0], "L", 1, "seq" if who[3] == "seq" else "shuf1", c))
            if value is None:
                cells.append(f"{'-':>18}")
            elif base:
                ratio = value / base if higher_is_better else base / value
                cells.append(f"{value:>11.1f} {ratio:5.2f}x")
            else:
                cells.append(f"{value:>18.1f}")
        print(f"{who[0]:9} {who[1]:6} {who[2]:>4} {who[3]:9} " + " ".join(cells))


table("decode", "gbs", lambda r: (r["batch"], r["ctx"]), True)
table("extend", "ms_32_layers", lambda r: (r["batch"], r["ctx"], r["q"]), False)
table("store", "us_per_layer", lambda r: r["tokens"], False)
table("mla", "gbs", lambda r: (r["batch"], r["ctx"]), True)
bad = [r for r in RESULTS if "error" in r or r.get("ok") is False]
print(f"\n{len(RESULTS)} rows, {len(bad)} failed or wrong, {time.monotonic() - T0:.0f} s")
for r in bad[:20]:
    print(json.dumps(r))
