// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "kvcached/arena.h"
#include "kvcached/ledger.h"
#include "kvcached/mapper.h"
#include "kvcached/page_pool.h"
#include "kvcached/vmm_driver.h"
#include "kvcached/vmm_fault.h"
#include "kvcached/vmm_host.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvc {
namespace {

using NoGil = nb::call_guard<nb::gil_scoped_release>;
using Pairs = std::vector<std::pair<std::int64_t, std::int64_t>>;

// A core object, together with the Python objects that it refers to and must not outlive. Its end
// may take driver calls or wait for a thread, so other Python threads run meanwhile.
template <typename T>
struct Owned {
  std::vector<nb::object> uses;
  std::unique_ptr<T> value;

  Owned(std::unique_ptr<T> owned, std::vector<nb::object> used)
      : uses(std::move(used)), value(std::move(owned)) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    nb::gil_scoped_release nogil;
    value.reset();
  }
  T* operator->() const { return value.get(); }
};
using PyPool = Owned<PagePool>;
using PyArena = Owned<Arena>;
using PyMapper = Owned<Mapper>;

std::vector<BlockRange> ranges_of(const Pairs& pairs) {
  std::vector<BlockRange> ranges;
  ranges.reserve(pairs.size());
  for (const auto& [begin, end] : pairs) ranges.push_back({begin, end});
  return ranges;
}

// Keeps the GIL when there is nothing to wait for, which is every step under steady load: giving it
// up would let a busy thread keep it for milliseconds.
template <Status (Mapper::*wait)()>
void wait_if_busy(PyMapper& self) {
  if (self->pending() == 0) {
    check(self->take_error());
    return;
  }
  nb::gil_scoped_release nogil;
  check((self.value.get()->*wait)());
}

template <typename T, typename... Args>
std::unique_ptr<T> open(Args... args) {
  nb::gil_scoped_release nogil;
  std::unique_ptr<T> backend;
  check(T::open(args..., &backend));
  return backend;
}

Op op_of(const std::string& name) {
  const auto found = std::find(kOpNames.begin(), kOpNames.end(), name);
  if (found == kOpNames.end()) throw nb::value_error(("no such operation: " + name).c_str());
  return static_cast<Op>(found - kOpNames.begin());
}

Code code_of(const std::string& name) {
  if (name == "out_of_memory") return Code::out_of_memory;
  if (name == "invalid_argument") return Code::invalid_argument;
  if (name == "not_supported") return Code::not_supported;
  if (name == "driver") return Code::driver;
  if (name == "lost") return Code::lost;
  throw nb::value_error(("no such code: " + name).c_str());
}

nb::dlpack::dtype dtype_of(const std::string& name) {
  using DtypeCode = nb::dlpack::dtype_code;
  struct Entry {
    const char* name;
    DtypeCode code;
    std::uint8_t bits;
  };
  static constexpr Entry kTypes[] = {
      {"int8", DtypeCode::Int, 8},
      {"uint8", DtypeCode::UInt, 8},
      {"int16", DtypeCode::Int, 16},
      {"int32", DtypeCode::Int, 32},
      {"int64", DtypeCode::Int, 64},
      {"float16", DtypeCode::Float, 16},
      {"bfloat16", DtypeCode::Bfloat, 16},
      {"float32", DtypeCode::Float, 32},
      {"float64", DtypeCode::Float, 64},
      {"float8_e4m3fn", DtypeCode::Float8_E4M3FN, 8},
      {"float8_e5m2", DtypeCode::Float8_E5M2, 8},
  };
  for (const Entry& entry : kTypes) {
    if (name == entry.name) return {static_cast<std::uint8_t>(entry.code), entry.bits, 1};
  }
  throw nb::value_error(("no such dtype: " + name).c_str());
}

nb::ndarray<nb::array_api> view(nb::handle owner, const std::vector<std::int64_t>& shape,
                                const std::vector<std::int64_t>& strides,
                                const std::string& dtype_name, std::int64_t byte_offset) {
  const Arena& arena = *nb::cast<PyArena&>(owner).value;
  if (arena.base() == 0) throw VmmError("the arena is closed");
  const nb::dlpack::dtype dtype = dtype_of(dtype_name);
  if (shape.size() != strides.size()) throw nb::value_error("shape and strides differ in length");
  const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  // Nothing the caller passes may wrap around unseen: every sum stays below twice the range, and
  // one product of two 64-bit numbers fits here.
  using Wide = __int128;
  const Wide room = static_cast<Wide>(arena.reserved_bytes()) - byte_offset;
  const Wide item = dtype.bits / 8;
  Wide bytes = empty ? 0 : item;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0 || strides[i] < 0) throw nb::value_error("negative shape or stride");
    if (empty || bytes > room) continue;
    const Wide last = static_cast<Wide>(shape[i] - 1) * strides[i];
    bytes = last > room ? room + 1 : bytes + last * item;
  }
  if (byte_offset < 0 || bytes > room) throw nb::value_error("the view leaves the arena");
  const std::vector<std::size_t> sizes(shape.begin(), shape.end());
  const DlpackDevice device = arena.backend().dlpack_device();
  const Address data = arena.base() + static_cast<Address>(byte_offset);
  return nb::ndarray<nb::array_api>(reinterpret_cast<void*>(data), sizes.size(), sizes.data(),
                                    owner, strides.data(), dtype, device.type, device.id);
}

void bind_backends(nb::module_& m) {
  nb::class_<Backend>(m, "Backend")
      .def_prop_ro("granularity", &Backend::granularity)
      .def_prop_ro("device_key", &Backend::device_key)
      .def(
          "memory_info",
          [](Backend& self) {
            MemoryInfo info;
            check(self.memory_info(&info));
            return std::pair(info.free, info.total);
          },
          NoGil())
      .def(
          "fence", [](Backend& self) { check(self.fence()); }, NoGil())
      .def(
          "upload",
          [](Backend& self, std::uint64_t to, std::uint64_t from, std::size_t bytes) {
            check(self.upload(to, reinterpret_cast<const void*>(from), bytes));
          },
          "to"_a, "from_"_a, "bytes"_a, NoGil())
      .def(
          "download",
          [](Backend& self, std::uint64_t to, std::uint64_t from, std::size_t bytes) {
            check(self.download(reinterpret_cast<void*>(to), from, bytes));
          },
          "to"_a, "from_"_a, "bytes"_a, NoGil())
      .def(
          "finish_copies", [](Backend& self) { check(self.finish_copies()); }, NoGil())
      .def(
          "copies_before",
          [](Backend& self, std::uint64_t stream) { check(self.copies_before(stream)); },
          "stream"_a, NoGil())
      .def(
          "pin",
          [](Backend& self, std::uint64_t memory, std::size_t bytes) {
            check(self.pin(reinterpret_cast<void*>(memory), bytes));
          },
          "memory"_a, "bytes"_a, NoGil())
      .def(
          "unpin",
          [](Backend& self, std::uint64_t memory) {
            check(self.unpin(reinterpret_cast<void*>(memory)));
          },
          "memory"_a, NoGil());
  m.def(
      "same_bytes",
      [](std::uint64_t a, std::uint64_t b, std::size_t bytes) {
        return std::memcmp(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                           bytes) == 0;
      },
      "a"_a, "b"_a, "bytes"_a, NoGil());

  nb::class_<HostBackend, Backend>(m, "HostBackend")
      .def(nb::new_(&open<HostBackend, std::string, std::size_t>), "name"_a, "capacity_bytes"_a)
      .def_prop_ro("physical_bytes", &HostBackend::physical_bytes);
  nb::class_<CudaBackend, Backend>(m, "CudaBackend")
      .def(nb::new_(&open<CudaBackend, int>), "ordinal"_a);
  nb::class_<HipBackend, Backend>(m, "HipBackend")
      .def(nb::new_(&open<HipBackend, int>), "ordinal"_a);

  nb::class_<FaultyBackend, Backend>(m, "FaultyBackend")
      .def(nb::init<Backend&>(), "inner"_a, nb::keep_alive<1, 2>())
      .def(
          "fail",
          [](FaultyBackend& self, std::uint64_t nth, const std::string& code,
             const std::optional<std::string>& op, std::uint64_t times) {
            self.fail(nth, code_of(code), op ? std::optional(op_of(*op)) : std::nullopt, times);
          },
          "nth"_a, "code"_a = "driver", "op"_a = nb::none(), "times"_a = 1)
      .def("clear", &FaultyBackend::clear)
      .def(
          "set_latency",
          [](FaultyBackend& self, const std::string& op, std::uint64_t microseconds) {
            self.set_latency(op_of(op), microseconds);
          },
          "op"_a, "microseconds"_a)
      .def(
          "calls",
          [](const FaultyBackend& self, const std::optional<std::string>& op) {
            return op ? self.calls(op_of(*op)) : self.calls();
          },
          "op"_a = nb::none());
}

void bind_pool(nb::module_& m) {
  nb::class_<PyPool>(m, "PagePool")
      .def(
          "__init__",
          [](PyPool* self, nb::handle_t<Backend> backend, std::size_t page_bytes,
             std::size_t max_ready_bytes, nb::object on_change) {
            PagePool::OnChange notify;
            if (!on_change.is_none()) {
              Member* member = nb::cast<Member*>(on_change);
              // It can only fail once the member has left, and then has no account to keep true.
              notify = [member](std::int64_t delta) { (void)member->add_committed(delta); };
            }
            new (self) PyPool(std::make_unique<PagePool>(nb::cast<Backend&>(backend), page_bytes,
                                                         max_ready_bytes, std::move(notify)),
                              {nb::borrow(backend), on_change});
          },
          "backend"_a, "page_bytes"_a, "max_ready_bytes"_a = 0, "on_change"_a = nb::none())
      .def_prop_ro("page_bytes", [](const PyPool& self) { return self->page_bytes(); })
      .def_prop_ro("ready_bytes", [](const PyPool& self) { return self->ready_bytes(); })
      .def_prop_ro("held_bytes", [](const PyPool& self) { return self->held_bytes(); })
      .def_prop_ro("creates", [](const PyPool& self) { return self->creates(); })
      .def_prop_ro("destroys", [](const PyPool& self) { return self->destroys(); })
      .def(
          "trim",
          [](PyPool& self, std::size_t bytes) {
            std::size_t freed = 0;
            check(self->trim(bytes, &freed));
            return freed;
          },
          "bytes"_a, NoGil())
      .def(
          "trim_idle",
          [](PyPool& self, double older_than_s) {
            std::size_t freed = 0;
            const std::chrono::duration<double> age(older_than_s);
            check(
                self->trim_idle(std::chrono::duration_cast<std::chrono::nanoseconds>(age), &freed));
            return freed;
          },
          "older_than_s"_a, NoGil());
}

void bind_arena(nb::module_& m) {
  nb::class_<PyArena>(m, "Arena")
      .def(
          "__init__",
          [](PyArena* self, nb::handle_t<Backend> backend, nb::handle_t<PyPool> pool,
             const Geometry& geometry, bool zero_recycled) {
            std::unique_ptr<Arena> arena;
            auto& pages = *nb::cast<PyPool&>(pool).value;
            auto& memory = nb::cast<Backend&>(backend);
            {
              nb::gil_scoped_release nogil;
              check(Arena::open(memory, pages, geometry, {zero_recycled}, &arena));
            }
            new (self) PyArena(std::move(arena), {nb::borrow(backend), nb::borrow(pool)});
          },
          "backend"_a, "pool"_a, "geometry"_a, "zero_recycled"_a = false)
      .def(
          "commit",
          [](PyArena& self, const Pairs& ranges) {
            return check_fits(self->commit(ranges_of(ranges)));
          },
          "ranges"_a, NoGil())
      .def(
          "decommit",
          [](PyArena& self, const Pairs& ranges) { check(self->decommit(ranges_of(ranges))); },
          "ranges"_a, NoGil())
      .def(
          "close", [](PyArena& self) { check(self->close()); }, NoGil())
      .def_prop_ro("base", [](const PyArena& self) { return self->base(); })
      .def_prop_ro("segment_stride", [](const PyArena& self) { return self->segment_stride(); })
      .def_prop_ro("reserved_bytes", [](const PyArena& self) { return self->reserved_bytes(); })
      .def_prop_ro(
          "committed_bytes", [](const PyArena& self) { return self->committed_bytes(); }, NoGil())
      .def_prop_ro(
          "stuck_bytes", [](const PyArena& self) { return self->stuck_bytes(); }, NoGil())
      .def_prop_ro("calls",
                   [](const PyArena& self) {
                     ArenaCalls calls;
                     {
                       nb::gil_scoped_release nogil;
                       calls = self->calls();
                     }
                     nb::dict counts;
                     counts["map"] = calls.map;
                     counts["set_access"] = calls.set_access;
                     counts["unmap"] = calls.unmap;
                     counts["zero"] = calls.zero;
                     return counts;
                   })
      .def(
          "is_committed",
          [](const PyArena& self, std::int64_t block) { return self->is_committed(block); },
          "block"_a, NoGil())
      .def("dlpack", &view, "shape"_a, "strides"_a, "dtype"_a, "byte_offset"_a = 0);
}

void bind_mapper(nb::module_& m) {
  nb::class_<PyMapper>(m, "Mapper")
      .def(
          "__init__",
          [](PyMapper* self, nb::handle_t<PyArena> arena, std::uint32_t retry_ms,
             nb::object on_freed, std::int64_t pace_pages, int pace_rest,
             std::uint32_t pace_longest_ms) {
            Mapper::OnFreed release;
            Mapper::OnMoved account;
            Pace pace{pace_pages, pace_rest, {}, std::chrono::milliseconds(pace_longest_ms)};
            if (!on_freed.is_none()) {
              Member* member = nb::cast<Member*>(on_freed);
              // False where the ledger is locked, or the member gone and its account with it. A
              // wrong number would be as wrong the next time.
              release = [member](std::size_t bytes) {
                return member->release(static_cast<std::int64_t>(bytes)).code != Code::lost;
              };
              account = [member](const Mapper::Moved& moved) {
                if (moved.commit_s >= 0) (void)member->time(Timed::map, moved.commit_s);
                if (moved.mapped != 0) (void)member->count(Counter::commits, moved.mapped);
                if (moved.returned != 0) (void)member->count(Counter::decommits, moved.returned);
              };
              pace.hurry = [member] {
                bool wait = false;
                return member->others_wait(wait).ok() && wait;
              };
            }
            new (self)
                PyMapper(std::make_unique<Mapper>(
                             *nb::cast<PyArena&>(arena).value, std::chrono::milliseconds(retry_ms),
                             std::move(release), std::move(account), std::move(pace)),
                         {nb::borrow(arena), on_freed});
          },
          "arena"_a, "retry_ms"_a = 0, "on_freed"_a = nb::none(), "pace_pages"_a = 4,
          "pace_rest"_a = 3, "pace_longest_ms"_a = Pace{}.longest.count())
      .def(
          "commit_now",
          [](PyMapper& self, const Pairs& ranges) { check(self->commit_now(ranges_of(ranges))); },
          "ranges"_a, NoGil())
      // Queueing never waits for the driver, so these keep the GIL.
      .def(
          "commit_ahead",
          [](PyMapper& self, const Pairs& ranges) { check(self->commit_ahead(ranges_of(ranges))); },
          "ranges"_a)
      .def(
          "decommit_later",
          [](PyMapper& self, const Pairs& ranges) {
            check(self->decommit_later(ranges_of(ranges)));
          },
          "ranges"_a)
      .def("wait_commits", &wait_if_busy<&Mapper::wait_commits>)
      .def("drain", &wait_if_busy<&Mapper::drain>)
      .def(
          "stop", [](PyMapper& self) { self->stop(); }, NoGil())
      .def_prop_ro("pending", [](const PyMapper& self) { return self->pending(); });
}

}  // namespace

void bind_vmm(nb::module_& m) {
  bind_backends(m);
  bind_pool(m);
  bind_arena(m);
  bind_mapper(m);
}

}  // namespace kvc
