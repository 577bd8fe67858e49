// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bindings.h"
#include "kvcached/ledger.h"
#include "kvcached/wait.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvc {
namespace {

// Let go of the GIL, if this thread has it, while it waits for another process or thread.
void* let_go() { return PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr; }
void take_back(void* token) {
  if (token != nullptr) PyEval_RestoreThread(static_cast<PyThreadState*>(token));
}

// The value a ledger operation writes to its last argument.
template <typename T, typename Operation>
T checked(Operation operation) {
  T out = {};
  check(operation(out));
  return out;
}

// As check, but who passes wrong numbers gets a ValueError.
void check_values(const Status& status) {
  if (status.code == Code::invalid_argument) throw nb::value_error(status.what.c_str());
  check(status);
}

template <typename Names>
int index_of(const Names& names, const std::string& name, const char* what) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found != std::end(names)) return static_cast<int>(found - std::begin(names));
  throw nb::value_error((std::string("no such ") + what + ": " + name).c_str());
}

template <typename Names>
nb::tuple tuple_of(const Names& names) {
  nb::list list;
  for (const std::string_view name : names) list.append(nb::str(name.data(), name.size()));
  return nb::tuple(list);
}

template <typename Names, typename Values>
nb::dict dict_of(const Names& names, const Values& values) {
  nb::dict dict;
  for (size_t i = 0; i < std::size(names); ++i) {
    dict[nb::str(names[i].data(), names[i].size())] = nb::cast(values[i]);
  }
  return dict;
}

// Waits in slices, so that a signal gets through to Python.
uint32_t wait_bell(Member& member, uint32_t seen, int64_t timeout_ms) {
  constexpr int64_t kSlice = 100;
  uint32_t now = 0;
  for (int64_t left = std::max<int64_t>(timeout_ms, 0);; left -= kSlice) {
    check(member.wait_bell(seen, std::min(left, kSlice), now));
    if (now != seen || left <= kSlice) return now;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

void bind_member_info(nb::module_& m) {
  nb::class_<Histogram>(m, "Histogram")
      .def_ro("counts", &Histogram::counts)
      .def_ro("sum_s", &Histogram::sum_s)
      .def_prop_ro("count",
                   [](const Histogram& self) {
                     uint64_t sum = 0;
                     for (const uint64_t count : self.counts) sum += count;
                     return sum;
                   })
      .def_static("bounds", [] {
        std::vector<double> bounds;
        for (int i = 0; i + 1 < kBuckets; ++i) bounds.push_back(Histogram::bound(i));
        return bounds;
      });
  nb::class_<MemberInfo>(m, "MemberInfo", "A member of a ledger at one moment.")
      .def_ro("slot", &MemberInfo::slot)
      .def_ro("generation", &MemberInfo::generation)
      .def_ro("name", &MemberInfo::name)
      .def_ro("pid", &MemberInfo::pid, "Of the process that joined, in its own PID namespace.")
      .def_ro("alive", &MemberInfo::alive)
      .def_ro("leased", &MemberInfo::leased)
      .def_ro("committed", &MemberInfo::committed)
      .def_ro("parked", &MemberInfo::parked)
      .def_ro("cached", &MemberInfo::cached)
      .def_ro("static_bytes", &MemberInfo::static_bytes)
      .def_ro("to_come", &MemberInfo::to_come,
              "Of the static bytes: promised, and not taken from the driver yet.")
      .def_ro("guessed", &MemberInfo::guessed,
              "Of the static bytes: a guess; the driver's figure has what it is.")
      .def_ro("demand", &MemberInfo::demand)
      .def_ro("limit", &MemberInfo::limit)
      .def_ro("guarantee", &MemberInfo::guarantee)
      .def_ro("weight", &MemberInfo::weight)
      .def_ro("priority", &MemberInfo::priority)
      .def_ro("cache_limit", &MemberInfo::cache_limit)
      .def_ro("desired_version", &MemberInfo::desired_version)
      .def_ro("observed_version", &MemberInfo::observed_version)
      .def_ro("asked", &MemberInfo::asked)
      .def_ro("asked_running", &MemberInfo::asked_running)
      .def_ro("returning", &MemberInfo::returning)
      .def_ro("pinned", &MemberInfo::pinned)
      .def_ro("waiting", &MemberInfo::waiting)
      .def_ro("idle_s", &MemberInfo::idle_s)
      .def_ro("passed_over", &MemberInfo::passed_over)
      .def_ro("trim_pending", &MemberInfo::trim_pending)
      .def_prop_ro("counters",
                   [](const MemberInfo& self) { return dict_of(kCounterNames, self.counters); })
      .def_prop_ro("histograms",
                   [](const MemberInfo& self) { return dict_of(kTimeNames, self.times); })
      .def_ro("started", &MemberInfo::started, "Seconds since the epoch.")
      .def("__repr__", [](const MemberInfo& self) {
        return "MemberInfo(slot=" + std::to_string(self.slot) + ", name='" + self.name +
               "', pid=" + std::to_string(self.pid) + (self.alive ? "" : ", dead") +
               ", leased=" + std::to_string(self.leased) +
               ", committed=" + std::to_string(self.committed) + ")";
      });
}

void bind_policy(nb::module_& m) {
  nb::class_<Policy>(m, "Policy", "What a member must comply with.")
      .def_ro("guarantee", &Policy::guarantee)
      .def_ro("limit", &Policy::limit)
      .def_ro("weight", &Policy::weight)
      .def_ro("priority", &Policy::priority)
      .def_ro("cache_limit", &Policy::cache_limit)
      .def_ro("version", &Policy::version)
      .def_ro("observed", &Policy::observed)
      .def_prop_ro("trim", [](const Policy& self) -> nb::object {
        if (!self.trim) return nb::none();
        const Trim& trim = *self.trim;
        const int64_t bytes = trim.bytes ? static_cast<int64_t>(*trim.bytes) : -1;
        return nb::make_tuple(trim.version, bytes, trim.cached);
      });

  nb::class_<LedgerEvent>(m, "LedgerEvent", "Something that happened to a member.")
      .def_ro("seq", &LedgerEvent::seq)
      .def_ro("time", &LedgerEvent::time, "Seconds since the epoch.")
      .def_ro("kind", &LedgerEvent::kind)
      .def_ro("slot", &LedgerEvent::slot, "-1: of no member.")
      .def_ro("name", &LedgerEvent::name)
      .def_ro("bytes", &LedgerEvent::bytes)
      .def_ro("text", &LedgerEvent::text)
      .def("__repr__", [](const LedgerEvent& self) {
        return "LedgerEvent(seq=" + std::to_string(self.seq) + ", kind='" + self.kind +
               "', slot=" + std::to_string(self.slot) + ", name='" + self.name +
               "', bytes=" + std::to_string(self.bytes) + ", text='" + self.text + "')";
      });
}

void bind_member(nb::module_& m) {
  const auto setter = [](Status (Member::*set)(int64_t)) {
    return [set](Member& self, int64_t value) { check((self.*set)(value)); };
  };
  nb::class_<Member>(m, "Member", "One process's share in a member of a ledger.")
      .def_prop_ro("slot", &Member::slot)
      .def_prop_ro("generation", &Member::generation)
      .def(
          "lease",
          [](Member& self, int64_t bytes, bool urgent) {
            return checked<bool>([&](bool& granted) { return self.lease(bytes, granted, urgent); });
          },
          "bytes"_a, "urgent"_a = false, "Lease all of it or nothing; False means not now.")
      .def(
          "lease_up_to",
          [](Member& self, int64_t bytes, int64_t quantum) {
            return checked<int64_t>(
                [&](int64_t& granted) { return self.lease_up_to(bytes, quantum, granted); });
          },
          "bytes"_a, "quantum"_a, "Lease what there is, in multiples of quantum.")
      .def(
          "release", [](Member& self, int64_t bytes) { check_values(self.release(bytes)); },
          "bytes"_a, "ValueError if more than is leased; nothing changes then.")
      .def("add_committed", setter(&Member::add_committed), "delta"_a)
      .def("add_static", setter(&Member::add_static), "delta"_a)
      .def(
          "adopt",
          [](Member& self, Member& other, int64_t bytes) {
            check_values(self.adopt(other, bytes));
          },
          "other"_a, "bytes"_a)
      .def("set_parked", setter(&Member::set_parked), "bytes"_a)
      .def("set_cached", setter(&Member::set_cached), "bytes"_a)
      .def("set_static", setter(&Member::set_static), "bytes"_a)
      .def("set_to_come", setter(&Member::set_to_come), "bytes"_a,
           "Of the static bytes: promised, and not taken from the driver yet.")
      .def("set_guessed", setter(&Member::set_guessed), "bytes"_a,
           "Of the static bytes: a guess; where the driver's figure is told, that counts.")
      .def(
          "set_demand",
          [](Member& self, int64_t bytes, int64_t waiting) {
            check(self.set_demand(bytes, waiting));
          },
          "bytes"_a, "waiting"_a = 0)
      .def("set_returning", setter(&Member::set_returning), "bytes"_a)
      .def("set_pinned", setter(&Member::set_pinned), "bytes"_a,
           "Of what is leased, the bytes no answer to an ask can bring; they are not asked for.")
      .def("set_unmapped", setter(&Member::set_unmapped), "bytes"_a,
           "Of what is committed, bytes about to be mapped: the driver may count them or not.")
      .def("touch", [](Member& self) { check(self.touch()); })
      .def("calm",
           [](Member& self) { return checked<bool>([&](bool& out) { return self.calm(out); }); })
      .def_prop_ro("leased",
                   [](Member& self) {
                     return checked<uint64_t>([&](uint64_t& out) { return self.leased(out); });
                   })
      .def(
          "claimable",
          [](Member& self, bool urgent) {
            return checked<uint64_t>([&](uint64_t& out) { return self.claimable(out, urgent); });
          },
          "urgent"_a = false)
      .def("ask",
           [](Member& self) {
             uint64_t soft = 0;
             uint64_t running = 0;
             check(self.ask(soft, running));
             return nb::make_tuple(soft, running);
           })
      .def("policy",
           [](Member& self) {
             return checked<Policy>([&](Policy& out) { return self.policy(out); });
           })
      .def(
          "observe", [](Member& self, uint64_t version) { check_values(self.observe(version)); },
          "version"_a)
      .def(
          "trim_done",
          [](Member& self, uint64_t version) { check_values(self.trim_done(version)); },
          "version"_a)
      .def(
          "count",
          [](Member& self, const std::string& counter, uint64_t n) {
            const int index = index_of(kCounterNames, counter, "counter");
            check(self.count(static_cast<Counter>(index), n));
          },
          "counter"_a, "n"_a = 1)
      .def(
          "time",
          [](Member& self, const std::string& kind, double seconds) {
            check(self.time(static_cast<Timed>(index_of(kTimeNames, kind, "time")), seconds));
          },
          "kind"_a, "seconds"_a)
      .def_prop_ro("bell",
                   [](Member& self) {
                     return checked<uint32_t>([&](uint32_t& out) { return self.bell(out); });
                   })
      .def("wait_bell", &wait_bell, "seen"_a, "timeout_ms"_a)
      .def("info",
           [](Member& self) {
             return checked<MemberInfo>([&](MemberInfo& out) { return self.info(out); });
           })
      .def(
          "leave", [](Member& self) { check(self.leave()); },
          "Give up this process's share; the last one of the member frees its slot.");
}

}  // namespace

void bind_ledger(nb::module_& m) {
  set_wait_hook({let_go, take_back});
  m.attr("COUNTERS") = tuple_of(kCounterNames);
  m.attr("TIMES") = tuple_of(kTimeNames);
  bind_member_info(m);
  bind_policy(m);
  bind_member(m);

  using Infos = std::vector<MemberInfo>;
  nb::class_<Ledger>(m, "Ledger", "The account of one device, shared by all its processes.")
      .def(nb::new_([](const std::filesystem::path& path, std::optional<int64_t> capacity_bytes,
                       std::optional<int64_t> headroom_bytes) {
             std::unique_ptr<Ledger> out;
             check(Ledger::open(path.string(), capacity_bytes, headroom_bytes, out));
             return out;
           }),
           "path"_a, "capacity_bytes"_a = nb::none(), "headroom_bytes"_a = nb::none(),
           "Open or create a ledger; None keeps the number of an existing one.")
      .def_static(
          "remove", [](const std::filesystem::path& path) { check(Ledger::remove(path.string())); },
          "path"_a, "Delete a ledger that no member uses, whatever is in it.")
      .def_prop_ro("path", &Ledger::path)
      .def_prop_ro("capacity", &Ledger::capacity)
      .def_prop_ro("headroom", &Ledger::headroom)
      .def_prop_ro("external", &Ledger::external, "Bytes in use on the device by no member.")
      .def_prop_ro("told", &Ledger::told, "Whether the driver's figure was ever told.")
      .def_prop_ro("version", &Ledger::version)
      .def_prop_ro("create_time", &Ledger::create_time, "Seconds since the epoch.")
      .def(
          "set_device_used",
          [](Ledger& self, int64_t bytes, std::optional<uint64_t> reading) {
            check(self.set_device_used(bytes, reading));
          },
          "bytes"_a, "reading"_a = nb::none(),
          "Publish the driver's total of bytes in use; with what reading() was before it was "
          "asked,\n"
          "unless an adoption made it out of date.")
      .def("reading", &Ledger::reading, "Changes whenever older totals are out of date.")
      .def("available",
           [](Ledger& self) {
             return checked<uint64_t>([&](uint64_t& out) { return self.available(out); });
           })
      .def("total_leased",
           [](Ledger& self) {
             return checked<uint64_t>([&](uint64_t& out) { return self.total_leased(out); });
           })
      .def(
          "total_demand",
          [](Ledger& self, int except_slot) {
            return checked<uint64_t>(
                [&](uint64_t& out) { return self.total_demand(except_slot, out); });
          },
          "except_slot"_a = -1, "Bytes that living members wait for.")
      .def("members",
           [](Ledger& self) {
             return checked<Infos>([&](Infos& out) { return self.members(out); });
           })
      .def(
          "reap",
          [](Ledger& self) { return checked<Infos>([&](Infos& out) { return self.reap(out); }); },
          "Free the slots of the dead and say who they were.")
      .def(
          "join",
          [](Ledger& self, const std::string& name, int64_t static_bytes, int64_t guarantee,
             std::optional<int64_t> limit, int64_t weight, int64_t priority,
             std::optional<int64_t> cache_limit) {
            const PolicyChange policy{guarantee, limit, weight, priority, cache_limit, {}};
            check_values(policy.check());
            std::unique_ptr<Member> out;
            check(self.join(name, static_bytes, policy, out));
            return out;
          },
          "name"_a, "static_bytes"_a = 0, nb::kw_only(), "guarantee"_a = 0, "limit"_a = nb::none(),
          "weight"_a = 100, "priority"_a = 0, "cache_limit"_a = nb::none())
      .def(
          "set_policy",
          [](Ledger& self, int slot, uint64_t generation, std::optional<int64_t> guarantee,
             std::optional<int64_t> limit, std::optional<int64_t> weight,
             std::optional<int64_t> priority, std::optional<int64_t> cache_limit,
             std::optional<uint64_t> expected_version) {
            const PolicyChange change{guarantee, limit,       weight,
                                      priority,  cache_limit, expected_version};
            uint64_t version = 0;
            check_values(self.set_policy(slot, generation, change, version));
            return version;
          },
          "slot"_a, "generation"_a, nb::kw_only(), "guarantee"_a = nb::none(),
          "limit"_a = nb::none(), "weight"_a = nb::none(), "priority"_a = nb::none(),
          "cache_limit"_a = nb::none(), "expected_version"_a = nb::none())
      .def(
          "trim",
          [](Ledger& self, int slot, uint64_t generation, int64_t bytes, bool cached) {
            uint64_t version = 0;
            check_values(self.trim(slot, generation, bytes, cached, version));
            return version;
          },
          "slot"_a, "generation"_a, "bytes"_a = -1, "cached"_a = false)
      .def(
          "events",
          [](Ledger& self, uint64_t since) {
            return checked<std::vector<LedgerEvent>>(
                [&](std::vector<LedgerEvent>& out) { return self.events(since, out); });
          },
          "since"_a = 0)
      .def(
          "note",
          [](Ledger& self, const std::string& kind, int slot, int64_t bytes) {
            check_values(self.note(kind, slot, bytes));
          },
          "kind"_a, "slot"_a, "bytes"_a)
      .def("overdraft",
           [](Ledger& self) {
             return checked<uint64_t>([&](uint64_t& out) { return self.overdraft(out); });
           })
      .def(
          "attach",
          [](Ledger& self, int slot, uint64_t generation) {
            std::unique_ptr<Member> out;
            check(self.attach(slot, generation, out));
            return out;
          },
          "slot"_a, "generation"_a, "Be a further process of a member.");
}

}  // namespace kvc
