// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "support.h"

using namespace kvc;
using namespace kvc::test;

namespace {

struct Mapped {
  std::unique_ptr<HostBackend> backend = host();
  Address base = 0;
  Page page;

  Mapped() {
    REQUIRE_OK(backend->reserve(8 * kPage, &base));
    REQUIRE_OK(backend->create(kPage, &page));
    REQUIRE_OK(backend->map(base, kPage, page));
    REQUIRE_OK(backend->set_access(base, kPage));
  }
};

}  // namespace

TEST_CASE("names are file stems") {
  std::unique_ptr<HostBackend> backend;
  for (const char* bad : {"", "a/b", "..", "a b", ".hidden"}) {
    CHECK(HostBackend::open(bad, kCapacity, &backend).code == Code::invalid_argument);
  }
  CHECK(HostBackend::open(std::string(65, 'a'), kCapacity, &backend).code ==
        Code::invalid_argument);
  REQUIRE_OK(HostBackend::open("node0_a.b-c", kCapacity, &backend));
  CHECK(backend->device_key() == "host-node0_a.b-c");
}

TEST_CASE("unmapped addresses fault, mapped ones do not") {
  Mapped m;
  CHECK_FALSE(faults(m.base, true));
  CHECK_FALSE(faults(m.base + kPage - 1, false));
  CHECK(faults(m.base + kPage, false));
  CHECK(faults(m.base + kPage, true));
  REQUIRE_OK(m.backend->unmap(m.base, kPage));
  CHECK(faults(m.base, false));
  CHECK(faults(m.base, true));
}

TEST_CASE("a mapped page faults until access is set") {
  auto backend = host();
  Address base = 0;
  Page page;
  REQUIRE_OK(backend->reserve(kPage, &base));
  REQUIRE_OK(backend->create(kPage, &page));
  REQUIRE_OK(backend->map(base, kPage, page));
  CHECK(faults(base, false));
  CHECK(backend->zero(base, kPage).code == Code::invalid_argument);
  REQUIRE_OK(backend->set_access(base, kPage));
  CHECK_FALSE(faults(base, true));
}

TEST_CASE("pages keep their content over remapping, and new ones read as zero") {
  Mapped m;
  std::memset(pointer(m.base), 0xAB, kPage);
  REQUIRE_OK(m.backend->unmap(m.base, kPage));
  REQUIRE_OK(m.backend->map(m.base + 4 * kPage, kPage, m.page));
  REQUIRE_OK(m.backend->set_access(m.base + 4 * kPage, kPage));
  CHECK(pointer(m.base + 4 * kPage)[kPage - 1] == 0xAB);

  REQUIRE_OK(m.backend->unmap(m.base + 4 * kPage, kPage));
  REQUIRE_OK(m.backend->destroy(m.page));
  Page fresh;
  REQUIRE_OK(m.backend->create(kPage, &fresh));
  CHECK(fresh.handle == m.page.handle);  // the slot is used again, and yet
  REQUIRE_OK(m.backend->map(m.base, kPage, fresh));
  REQUIRE_OK(m.backend->set_access(m.base, kPage));
  const unsigned char* bytes = pointer(m.base);
  CHECK(std::all_of(bytes, bytes + kPage, [](unsigned char c) { return c == 0; }));
}

TEST_CASE("zero clears a run") {
  Mapped m;
  Page second;
  REQUIRE_OK(m.backend->create(kPage, &second));
  REQUIRE_OK(m.backend->map(m.base + kPage, kPage, second));
  REQUIRE_OK(m.backend->set_access(m.base, 2 * kPage));
  unsigned char* bytes = pointer(m.base);
  std::memset(bytes, 1, 2 * kPage);
  REQUIRE_OK(m.backend->zero(m.base, 2 * kPage));
  CHECK(std::all_of(bytes, bytes + 2 * kPage, [](unsigned char c) { return c == 0; }));
}

TEST_CASE("the kernel holds exactly the pages that exist") {
  auto backend = host();
  CHECK(backend->physical_bytes() == 0);
  std::vector<Page> pages(5);
  for (Page& page : pages) REQUIRE_OK(backend->create(kPage, &page));
  CHECK(backend->physical_bytes() == 5 * kPage);
  MemoryInfo info;
  REQUIRE_OK(backend->memory_info(&info));
  CHECK(info.free == kCapacity - 5 * kPage);
  CHECK(info.total == kCapacity);
  for (int i : {3, 1, 4, 0}) REQUIRE_OK(backend->destroy(pages[i]));
  CHECK(backend->physical_bytes() == kPage);
  for (int i = 0; i < 4; ++i) REQUIRE_OK(backend->create(kPage, &pages[i]));
  CHECK(backend->physical_bytes() == 5 * kPage);
}

TEST_CASE("capacity runs out as memory does") {
  auto backend = host(2 * kPage);
  Page page;
  REQUIRE_OK(backend->create(kPage, &page));
  CHECK(backend->create(2 * kPage, &page).code == Code::out_of_memory);
  Page last;
  REQUIRE_OK(backend->create(kPage, &last));
  Page none;
  CHECK(backend->create(kPage, &none).code == Code::out_of_memory);
  CHECK_FALSE(none);
  REQUIRE_OK(backend->destroy(last));
  REQUIRE_OK(backend->create(kPage, &last));
}

TEST_CASE("misuse is refused and changes nothing") {
  Mapped m;
  Backend& b = *m.backend;
  Page other;
  REQUIRE_OK(b.create(2 * kPage, &other));
  const auto invalid = [](const Status& status) { return status.code == Code::invalid_argument; };
  Address none = 0;
  CHECK(invalid(b.reserve(100, &none)));
  CHECK(invalid(b.reserve(0, &none)));
  CHECK(invalid(b.create(100, &other)));
  CHECK(invalid(b.map(m.base, 2 * kPage, other)));              // over a mapping
  CHECK(invalid(b.map(m.base + 2 * kPage, kPage, other)));      // part of a page
  CHECK(invalid(b.map(m.base + 2 * kPage, kPage, m.page)));     // a second time
  CHECK(invalid(b.map(m.base + 7 * kPage, 2 * kPage, other)));  // beyond the range
  CHECK(invalid(b.map(m.base + 100, 2 * kPage, other)));        // not aligned
  CHECK(invalid(b.map(0, 2 * kPage, other)));                   // no range at all
  CHECK(invalid(b.map(m.base + 2 * kPage, kPage, Page{12345})));
  CHECK(invalid(b.set_access(m.base, 2 * kPage)));  // half of it is not mapped
  CHECK(invalid(b.unmap(m.base, kPage / 2)));
  CHECK(invalid(b.unmap(m.base + kPage, kPage)));
  CHECK(invalid(b.unmap(m.base, 2 * kPage)));
  CHECK(invalid(b.destroy(m.page)));  // still mapped
  CHECK(invalid(b.destroy(Page{12345})));
  CHECK(invalid(b.release_range(m.base, 8 * kPage)));  // still in use
  CHECK(invalid(b.release_range(m.base, kPage)));
  pointer(m.base)[0] = 1;  // and all is as it was
  REQUIRE_OK(b.unmap(m.base, kPage));
  REQUIRE_OK(b.destroy(m.page));
  REQUIRE_OK(b.destroy(other));
  REQUIRE_OK(b.release_range(m.base, 8 * kPage));
  CHECK(m.backend->physical_bytes() == 0);
}

TEST_CASE("a run of mappings is unmapped in one call") {
  auto backend = host();
  Address base = 0;
  REQUIRE_OK(backend->reserve(4 * kPage, &base));
  std::vector<Page> pages(4);
  for (std::size_t i = 0; i < pages.size(); ++i) {
    REQUIRE_OK(backend->create(kPage, &pages[i]));
    REQUIRE_OK(backend->map(base + i * kPage, kPage, pages[i]));
  }
  REQUIRE_OK(backend->set_access(base, 4 * kPage));
  REQUIRE_OK(backend->unmap(base + kPage, 2 * kPage));
  CHECK(readable(base));
  CHECK_FALSE(readable(base + kPage));
  CHECK_FALSE(readable(base + 3 * kPage - 1));
  CHECK(readable(base + 3 * kPage));
}

TEST_CASE("the fault wrapper fails the k-th call, of one operation if asked") {
  auto inner = host();
  FaultyBackend backend(*inner);
  Page page;
  Address base = 0;
  backend.fail(2, Code::driver);
  REQUIRE_OK(backend.create(kPage, &page));
  CHECK(backend.reserve(kPage, &base).code == Code::driver);
  CHECK(base == 0);
  REQUIRE_OK(backend.reserve(kPage, &base));

  backend.fail(1, Code::out_of_memory, Op::create, 2);
  REQUIRE_OK(backend.map(base, kPage, page));
  Page none;
  CHECK(backend.create(kPage, &none).code == Code::out_of_memory);
  CHECK(backend.create(kPage, &none).code == Code::out_of_memory);
  CHECK(inner->physical_bytes() == kPage);  // a failed call never reached the backend
  REQUIRE_OK(backend.create(kPage, &none));

  backend.fail(1, Code::driver, Op::unmap);
  backend.clear();
  REQUIRE_OK(backend.unmap(base, kPage));
  CHECK(backend.calls(Op::create) == 4);
  CHECK(backend.calls(Op::reserve) == 2);
  CHECK(backend.calls() == 8);

  backend.set_latency(Op::fence, 20000);
  const auto start = std::chrono::steady_clock::now();
  REQUIRE_OK(backend.fence());
  CHECK(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(20));
}

TEST_CASE("copies reach mapped addresses only") {
  Mapped m;
  std::vector<char> there(2 * kPage, 'x'), back(kPage, ' ');
  REQUIRE_OK(m.backend->upload(m.base + 16, there.data(), kPage - 16));
  REQUIRE_OK(m.backend->download(back.data(), m.base + 16, kPage - 16));
  CHECK(std::count(back.begin(), back.end(), 'x') == kPage - 16);
  CHECK(m.backend->upload(m.base + 16, there.data(), kPage).code == Code::invalid_argument);
  CHECK(m.backend->download(back.data(), m.base + kPage, 1).code == Code::invalid_argument);
  CHECK(m.backend->download(back.data(), m.base - 1, 1).code == Code::invalid_argument);
  // Over several mappings at once; and not where access was not set.
  Page next;
  REQUIRE_OK(m.backend->create(kPage, &next));
  REQUIRE_OK(m.backend->map(m.base + kPage, kPage, next));
  CHECK(m.backend->upload(m.base, there.data(), 2 * kPage).code == Code::invalid_argument);
  REQUIRE_OK(m.backend->set_access(m.base + kPage, kPage));
  REQUIRE_OK(m.backend->upload(m.base, there.data(), 2 * kPage));
}
