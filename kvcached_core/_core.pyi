# SPDX-License-Identifier: Apache-2.0
"""The native core of kvcached: elastic device memory and its shared account."""

# --- vmm ---
import os
from typing import Any, Literal, final

Ranges = list[tuple[int, int]]
_Op = Literal[
    "reserve",
    "release_range",
    "create",
    "destroy",
    "map",
    "set_access",
    "unmap",
    "zero",
    "fence",
    "memory_info",
    "upload",
    "download",
    "finish_copies",
    "copies_before",
    "pin",
    "unpin",
]
_Code = Literal["out_of_memory", "invalid_argument", "not_supported", "driver", "lost"]

class VmmError(RuntimeError):
    """The driver or the OS refused, or the call was wrong; the message says what to do."""

class LedgerRefused(VmmError):
    """A policy says no; the message names who holds the memory, and what to do."""

class Backend:
    """Physical memory of one device: see csrc/include/kvcached/vmm.h for the contract."""

    @property
    def granularity(self) -> int: ...
    @property
    def device_key(self) -> str:
        """Names the ledger: ``gpu-<uuid as NVML prints it>`` or ``host-<name>``."""

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes, as the driver sees them."""

    def fence(self) -> None:
        """Wait for all device work this process issued before the call."""

    def upload(self, to: int, from_: int, bytes: int) -> None:
        """Queue a copy from host memory to mapped addresses; both stay until it is finished."""

    def download(self, to: int, from_: int, bytes: int) -> None:
        """Queue a copy from mapped addresses to host memory."""

    def finish_copies(self) -> None:
        """Wait for all copies queued so far."""

    def copies_before(self, stream: int) -> None:
        """Have what is issued on a stream from now on wait for the copies queued so far."""

    def pin(self, memory: int, bytes: int) -> None:
        """Lock host memory, so that copies run at the bus's speed. A no-op on the host."""

    def unpin(self, memory: int) -> None: ...

def same_bytes(a: int, b: int, bytes: int) -> bool:
    """Whether two ranges of host memory are equal."""

@final
class HostBackend(Backend):
    def __init__(self, name: str, capacity_bytes: int) -> None: ...
    @property
    def physical_bytes(self) -> int:
        """Bytes the kernel holds for the pages, as it counts them."""

@final
class CudaBackend(Backend):
    def __init__(self, ordinal: int) -> None:
        """``ordinal`` counts visible devices. KVCACHED_LIBCUDA overrides the library."""

@final
class HipBackend(Backend):
    def __init__(self, ordinal: int) -> None:
        """``ordinal`` counts visible devices. KVCACHED_LIBHIP overrides the library."""

@final
class FaultyBackend(Backend):
    """Fails or delays the calls of another backend on demand, for tests."""

    def __init__(self, inner: Backend) -> None: ...
    def fail(self, nth: int, code: _Code = "driver", op: _Op | None = None, times: int = 1) -> None:
        """Fail the ``nth`` matching call from now (1 is the next) and ``times - 1`` after it."""

    def clear(self) -> None: ...
    def set_latency(self, op: _Op, microseconds: int) -> None: ...
    def calls(self, op: _Op | None = None) -> int: ...

@final
class PagePool:
    """Creates and destroys the pages of one size; recycled ones stay ready up to a limit.

    Args:
        on_change: ledger member whose committed bytes follow this pool's held bytes.
    """

    def __init__(
        self,
        backend: Backend,
        page_bytes: int,
        max_ready_bytes: int = 0,
        on_change: Member | None = None,
    ) -> None: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def ready_bytes(self) -> int:
        """Bytes of pages kept for reuse."""

    @property
    def held_bytes(self) -> int:
        """Bytes of all pages that exist: ready ones and those handed to arenas."""

    @property
    def creates(self) -> int: ...
    @property
    def destroys(self) -> int: ...
    def trim(self, bytes: int) -> int:
        """Destroy ready pages, the longest idle first, to free that much; return bytes freed."""

    def trim_idle(self, older_than_s: float) -> int:
        """Destroy pages that have been ready for longer; return bytes freed."""

@final
class Arena:
    """A reserved range of addresses holding blocks, backed page by page.

    Block 0 is committed from the start and stays so.
    """

    def __init__(
        self, backend: Backend, pool: PagePool, geometry: Geometry, zero_recycled: bool = False
    ) -> None: ...
    def commit(self, ranges: Ranges) -> bool:
        """Back the blocks, all or none; False when physical memory is short."""

    def decommit(self, ranges: Ranges) -> None:
        """Give the blocks' pages up, all or none. No work in flight may touch them."""

    def close(self) -> None:
        """Unmap everything and give the range up; tensors on it fault from then on."""

    @property
    def base(self) -> int: ...
    @property
    def segment_stride(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def committed_bytes(self) -> int:
        """Bytes of the pages mapped for committed blocks."""

    @property
    def stuck_bytes(self) -> int:
        """Bytes of pages the driver refused to move; retried by every later call."""

    @property
    def calls(self) -> dict[str, int]:
        """How often the arena called the driver, by operation."""

    def is_committed(self, block: int) -> bool: ...
    def dlpack(self, shape: list[int], strides: list[int], dtype: str, byte_offset: int = 0) -> Any:
        """A view on the range for ``from_dlpack``; strides in elements, dtype as torch names it.

        It keeps the arena alive. Elements whose block is not committed fault when touched.
        """

@final
class Mapper:
    """Applies commits and decommits to an arena, in the background where they can wait.

    Calls take effect in order, with one exception: a commit that is wanted now passes
    decommits in the queue that share no page with it. A background call that failed changed
    nothing; its error is raised by the next call of any method but ``stop``.
    """

    def __init__(self, arena: Arena, retry_ms: int = 0, on_freed: Member | None = None) -> None:
        """``retry_ms``: how long to retry a commit for which memory is short.
        ``on_freed``: ledger member whose lease shrinks by what the arena gives back, and whose
        histogram ``map`` and counters ``commits`` and ``decommits`` (of pages) this keeps.
        """

    def commit_now(self, ranges: Ranges) -> None:
        """Back the blocks, and wait for all commits queued before."""

    def commit_ahead(self, ranges: Ranges) -> None: ...
    def decommit_later(self, ranges: Ranges) -> None:
        """Give the blocks up once all device work issued so far is done."""

    def wait_commits(self) -> None:
        """Wait for all commits queued so far."""

    def drain(self) -> None:
        """Wait for everything queued so far."""

    def stop(self) -> None:
        """Finish what is queued and end the thread."""

    @property
    def pending(self) -> int: ...

# --- end of vmm ---

# --- blocks ---
@final
class Geometry:
    """How blocks lie on pages; the same in every segment of an arena."""

    def __init__(
        self, block_bytes: int, page_bytes: int, num_blocks: int, segments: int = 1
    ) -> None:
        """``block_bytes``: of one block within one segment."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def pages_per_segment(self) -> int: ...
    @property
    def unit_bytes(self) -> int:
        """Device bytes of one page index: a page in every segment."""

    def pages_of(self, block: int) -> tuple[int, int]:
        """The page indices ``[first, end)`` that a block touches."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Growth:
    """Blocks committed or decommitted, and the pages that moved. Falsy without blocks."""

    @property
    def ranges(self) -> Ranges:
        """Half-open ranges of block ids, ascending and disjoint."""

    @property
    def page_delta(self) -> list[int]:
        """Change of the committed page indices, per geometry."""

    @property
    def num_blocks(self) -> int: ...
    def __bool__(self) -> bool: ...

@final
class BlockAllocator:
    """Which blocks have memory, and which are handed out next. Not thread-safe.

    A block is uncommitted, clean (committed and free) or live. Block 0, the null block, is
    live from the start and never freed. ``geometries[0]`` is the primary one, with the largest
    blocks; the others are only counted.
    """

    def __init__(self, num_blocks: int, geometries: list[Geometry]) -> None: ...
    def grow(self, n: int) -> Growth:
        """Commit blocks until ``n`` more are clean, or no uncommitted one is left.

        Blocks that cost no page come first, all of them; then the lowest ids.
        """

    def cost(self, n: int) -> list[int]:
        """The ``page_delta`` that ``grow(n)`` would have."""

    def undo(self, growth: Growth) -> Growth:
        """Take back the latest growth, none of whose blocks was allocated since."""

    def shrink(self, max_bytes: int) -> Growth:
        """Decommit parked pages, highest first, until ``max_bytes`` of primary pages are free.

        Counts whole pages, and pages that one block spans are freed together: the result may
        exceed ``max_bytes`` by less than a page, or by less than a block where blocks are larger.
        """

    def allocate(self, n: int) -> list[int]:
        """Make ``n`` clean blocks live, those on the fullest pages first."""

    def allocate_beside(self, n: int, beside: int) -> list[int]:
        """As :meth:`allocate`, but first on the page of the live block ``beside`` (0: of none) and
        then on pages with no live block.
        """

    def free(self, blocks: list[int]) -> None:
        """Make live blocks clean, all or none; ``blocks[0]`` is the first to be reused."""

    def allocate_array(self, n: int) -> Any:
        """As :meth:`allocate`, into a numpy array: int32, shape ``[n]``."""

    def free_array(self, blocks: Any) -> None:
        """As :meth:`free`, from a contiguous array on the host: int32, shape ``[n]``."""

    def live_array(self) -> Any:
        """Every live block but the null block, ascending: numpy, int32."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_live(self) -> int:
        """Includes the null block."""

    @property
    def num_clean(self) -> int: ...
    @property
    def num_uncommitted(self) -> int: ...
    @property
    def parked_pages(self) -> int:
        """Committed primary pages that no live block touches."""

    @property
    def geometries(self) -> list[Geometry]: ...
    def committed_pages(self, geometry: int = 0) -> int:
        """Committed page indices of a geometry."""

    def clean_beside(self, block: int) -> int:
        """Clean blocks on the page that is home to a block."""

    def live_on_page(self, page: int) -> int:
        """Live blocks that touch a primary page."""

    def pages_of(self, block: int) -> tuple[int, int]:
        """The primary page indices ``[first, end)`` that a block touches."""

    def emptied_by(self, candidates: list[int], pages: int) -> list[int]:
        """Which live blocks to free so that ``pages`` primary pages hold none, or as many as can.

        ``candidates`` come in the order they should go; a page is emptied whole or left alone.
        """

    def free_order(self) -> list[int]:
        """Every clean block in the order ``allocate`` would return them; for debugging."""

# --- end of blocks ---

# --- ledger ---
COUNTERS: tuple[str, ...]
TIMES: tuple[str, ...]

@final
class Histogram:
    """Times: bucket ``i`` counts those up to ``bounds()[i]``, the last one the rest."""

    @property
    def counts(self) -> list[int]:
        """Of each bucket by itself, not cumulative."""

    @property
    def sum_s(self) -> float: ...
    @property
    def count(self) -> int: ...
    @staticmethod
    def bounds() -> list[float]:
        """Upper bounds in seconds of all buckets but the last."""

@final
class Policy:
    """What a member must comply with, and what of it it has."""

    @property
    def guarantee(self) -> int: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def weight(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def cache_limit(self) -> int | None:
        """Bound for unreferenced prefix cache."""

    @property
    def version(self) -> int: ...
    @property
    def observed(self) -> int: ...
    @property
    def trim(self) -> tuple[int, int, bool] | None:
        """Version, bytes (-1: all) and whether of the prefix cache too, while one is pending."""

@final
class LedgerEvent:
    """Something that happened to a member."""

    @property
    def seq(self) -> int: ...
    @property
    def time(self) -> float:
        """Seconds since the epoch."""

    @property
    def kind(self) -> str:
        """join leave died refused policy trim ask passed_over preempt overdraft"""

    @property
    def slot(self) -> int:
        """-1: of no member."""

    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def text(self) -> str: ...

@final
class MemberInfo:
    """A member of a ledger at one moment."""

    @property
    def slot(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int:
        """Of the process that joined, in its own PID namespace."""

    @property
    def alive(self) -> bool:
        """Whether any process of the member lives."""

    @property
    def leased(self) -> int: ...
    @property
    def committed(self) -> int: ...
    @property
    def parked(self) -> int: ...
    @property
    def cached(self) -> int: ...
    @property
    def static_bytes(self) -> int: ...
    @property
    def to_come(self) -> int:
        """Of the static bytes: promised, and not taken from the driver yet."""

    @property
    def guessed(self) -> int:
        """Of the static bytes: a guess; the driver's figure has what it is."""

    @property
    def demand(self) -> int:
        """0 unless it was posted within the last 5 s."""

    @property
    def limit(self) -> int | None: ...
    @property
    def cache_limit(self) -> int | None: ...
    @property
    def guarantee(self) -> int: ...
    @property
    def weight(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def desired_version(self) -> int: ...
    @property
    def observed_version(self) -> int:
        """Equal to the desired one once the member complies with its policy."""

    @property
    def asked(self) -> int:
        """Bytes it is asked to give back, by the latest plan: parked and cached."""

    @property
    def asked_running(self) -> int:
        """Bytes beyond those, for which running requests must be preempted."""

    @property
    def returning(self) -> int:
        """Bytes decommitted and not yet released by its workers."""

    @property
    def pinned(self) -> int:
        """Of ``leased``, what no answer to an ask can bring."""

    @property
    def waiting(self) -> int:
        """Requests that wait for memory."""

    @property
    def idle_s(self) -> float:
        """Since it last ran a step."""

    @property
    def passed_over(self) -> int:
        """Times it did not answer an ask in time."""

    @property
    def trim_pending(self) -> bool: ...
    @property
    def counters(self) -> dict[str, int]: ...
    @property
    def histograms(self) -> dict[str, Histogram]: ...
    @property
    def started(self) -> float:
        """Seconds since the epoch."""

@final
class Member:
    """One process's share in a member of a ledger; it ends with ``leave`` or the object.

    Made by ``Ledger.join`` and ``Ledger.attach``. Unusable in a forked child, which attaches
    itself instead.
    """

    @property
    def slot(self) -> int: ...
    @property
    def generation(self) -> int: ...
    def lease(self, bytes: int, urgent: bool = False) -> bool:
        """Lease all of it or nothing; False means not now.

        What is ``urgent`` keeps requests going that run already: it yields to guarantees and
        higher priorities only.
        """

    def claimable(self, urgent: bool = False) -> int:
        """What could be leased now, policy included."""

    def lease_up_to(self, bytes: int, quantum: int) -> int:
        """Lease what there is up to ``bytes``, in multiples of ``quantum``."""

    def release(self, bytes: int) -> None:
        """ValueError if more than is leased; nothing changes then. Rings for those who wait."""

    def add_committed(self, delta: int) -> None: ...
    def add_static(self, delta: int) -> None:
        """VmmError if less than nothing would be left."""

    def adopt(self, other: Member, bytes: int) -> None:
        """Make bytes that another member of this process leased and committed static ones of this.

        At once, so that nobody ever sees them twice or not at all. ValueError if the other has not
        leased so many; nothing changes then.
        """

    def set_parked(self, bytes: int) -> None: ...
    def set_cached(self, bytes: int) -> None: ...
    def set_static(self, bytes: int) -> None: ...
    def set_to_come(self, bytes: int) -> None:
        """Of the static bytes: promised, and not taken from the driver yet."""

    def set_guessed(self, bytes: int) -> None:
        """Of the static bytes: a guess; where the driver's figure is told, that counts."""

    def set_demand(self, bytes: int, waiting: int = 0) -> None:
        """Say what this member waits for, and how many requests do; counts for 5 s."""

    def set_returning(self, bytes: int) -> None: ...
    def set_pinned(self, bytes: int) -> None:
        """Of what is leased, the bytes no answer to an ask can bring; they are not asked for."""

    def set_unmapped(self, bytes: int) -> None:
        """Of what is committed, bytes about to be mapped: the driver may count them or not."""

    def touch(self) -> None:
        """A step ran now."""

    def calm(self) -> bool:
        """Whether nobody wants anything of this member; lock-free, for every step.

        None waits for memory, nothing is asked of it, and no policy or trim is new to it.
        """

    @property
    def leased(self) -> int:
        """Bytes; lock-free."""

    def ask(self) -> tuple[int, int]:
        """Bytes asked for now: of parked and cached ones, and beyond those (preempt)."""

    def policy(self) -> Policy: ...
    def observe(self, version: int) -> None:
        """Acknowledge a policy: this member complies with it."""

    def trim_done(self, version: int) -> None: ...
    def count(self, counter: str, n: int = 1) -> None:
        """One of COUNTERS. Lock-free; for any process of the member."""

    def time(self, kind: str, seconds: float) -> None:
        """One of TIMES. Lock-free; for any process of the member."""

    @property
    def bell(self) -> int:
        """Rung when more is asked for, the policy changes, or awaited bytes may be there."""

    def wait_bell(self, seen: int, timeout_ms: int) -> int:
        """Wait until the bell is not ``seen``, or the timeout; other threads run meanwhile.

        Raises VmmError once the member has left.
        """

    def info(self) -> MemberInfo: ...
    def leave(self) -> None:
        """Give up this process's share; the last one of the member frees its slot."""

@final
class Ledger:
    """The account of one device, shared by all its processes."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        headroom_bytes: int | None = None,
    ) -> None:
        """Open or create a ledger; None keeps the number of an existing one.

        Numbers that differ from those of living members are refused.
        """

    @staticmethod
    def remove(path: str | os.PathLike[str]) -> None:
        """Delete a ledger that no member uses, whatever is in it; gone already is fine.

        LedgerRefused if a member lives.
        """

    @property
    def path(self) -> str: ...
    @property
    def capacity(self) -> int: ...
    @property
    def headroom(self) -> int: ...
    @property
    def external(self) -> int:
        """Bytes in use on the device by no member."""

    @property
    def told(self) -> bool:
        """Whether the driver's figure was ever told."""

    @property
    def version(self) -> int: ...
    @property
    def create_time(self) -> float:
        """Seconds since the epoch."""

    def set_device_used(self, bytes: int, reading: int | None = None) -> None:
        """
        Publish the driver's total of bytes in use; with what reading() was before it was asked,
        unless an adoption made it out of date.
        """

    def reading(self) -> int:
        """Changes whenever older totals are out of date."""

    def available(self) -> int:
        """Bytes that could be leased now."""

    def total_leased(self) -> int: ...
    def total_demand(self, except_slot: int = -1) -> int:
        """Bytes that living members wait for."""

    def members(self) -> list[MemberInfo]: ...
    def reap(self) -> list[MemberInfo]:
        """Free the slots of the dead and say who they were."""

    def join(
        self,
        name: str,
        static_bytes: int = 0,
        *,
        guarantee: int = 0,
        limit: int | None = None,
        weight: int = 100,
        priority: int = 0,
        cache_limit: int | None = None,
    ) -> Member:
        """Raises LedgerRefused if its guarantee and static bytes do not fit beside the others'."""

    def attach(self, slot: int, generation: int) -> Member:
        """Be a further process of a member."""

    def set_policy(
        self,
        slot: int,
        generation: int,
        *,
        guarantee: int | None = None,
        limit: int | None = None,
        weight: int | None = None,
        priority: int | None = None,
        cache_limit: int | None = None,
        expected_version: int | None = None,
    ) -> int:
        """Change a policy and return its version; None leaves as is, -1 lifts a limit.

        Raises:
            ValueError: a number no policy may have, or a limit below the guarantee.
            LedgerRefused: the guarantees would not fit, or the version is not the expected one.
        """

    def trim(self, slot: int, generation: int, bytes: int = -1, cached: bool = False) -> int:
        """Ask a member to give back unused bytes (-1: all); return the version to wait for."""

    def events(self, since: int = 0) -> list[LedgerEvent]:
        """The latest 256 at most, oldest first, with numbers above ``since``."""

    def note(self, kind: str, slot: int, bytes: int) -> None:
        """Record an event."""

    def overdraft(self) -> int:
        """By how much leases, headroom and non-KV memory exceed the capacity."""

# --- end of ledger ---
