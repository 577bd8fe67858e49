// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
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

void bind_member_info(nb::module_& m) {
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
      .def_ro("demand", &MemberInfo::demand)
      .def_ro("limit", &MemberInfo::limit)
      .def_ro("guarantee", &MemberInfo::guarantee)
      .def_ro("weight", &MemberInfo::weight)
      .def_ro("priority", &MemberInfo::priority)
      .def_ro("started", &MemberInfo::started, "Seconds since the epoch.")
      .def("__repr__", [](const MemberInfo& self) {
        return "MemberInfo(slot=" + std::to_string(self.slot) + ", name='" + self.name +
               "', pid=" + std::to_string(self.pid) + (self.alive ? "" : ", dead") +
               ", leased=" + std::to_string(self.leased) +
               ", committed=" + std::to_string(self.committed) + ")";
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
          [](Member& self, int64_t bytes) {
            return checked<bool>([&](bool& granted) { return self.lease(bytes, granted); });
          },
          "bytes"_a, "Lease all of it or nothing; False means not now.")
      .def(
          "lease_up_to",
          [](Member& self, int64_t bytes, int64_t quantum) {
            return checked<int64_t>(
                [&](int64_t& granted) { return self.lease_up_to(bytes, quantum, granted); });
          },
          "bytes"_a, "quantum"_a, "Lease what there is, in multiples of quantum.")
      .def(
          "release",
          [](Member& self, int64_t bytes) {
            const Status status = self.release(bytes);
            if (status.code == Code::invalid_argument) throw nb::value_error(status.what.c_str());
            check(status);
          },
          "bytes"_a, "ValueError if more than is leased; nothing changes then.")
      .def("add_committed", setter(&Member::add_committed), "delta"_a)
      .def("set_parked", setter(&Member::set_parked), "bytes"_a)
      .def("set_cached", setter(&Member::set_cached), "bytes"_a)
      .def("set_static", setter(&Member::set_static), "bytes"_a)
      .def("set_demand", setter(&Member::set_demand), "bytes"_a)
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
  bind_member_info(m);
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
      .def_prop_ro("path", &Ledger::path)
      .def_prop_ro("capacity", &Ledger::capacity)
      .def_prop_ro("headroom", &Ledger::headroom)
      .def_prop_ro("external", &Ledger::external, "Bytes in use on the device by no member.")
      .def_prop_ro("version", &Ledger::version)
      .def_prop_ro("create_time", &Ledger::create_time, "Seconds since the epoch.")
      .def(
          "set_device_used",
          [](Ledger& self, int64_t bytes) { check(self.set_device_used(bytes)); }, "bytes"_a,
          "Publish the driver's total of bytes in use.")
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
          [](Ledger& self, const std::string& name, int64_t static_bytes) {
            std::unique_ptr<Member> out;
            check(self.join(name, static_bytes, out));
            return out;
          },
          "name"_a, "static_bytes"_a = 0)
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
