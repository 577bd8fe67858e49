// SPDX-License-Identifier: Apache-2.0
#include "kvcached/vmm_fault.h"

#include <chrono>
#include <thread>

namespace kvc {

void FaultyBackend::fail(std::uint64_t nth, Code code, std::optional<Op> op, std::uint64_t times) {
  std::lock_guard lock(mutex_);
  skip_ = nth > 0 ? nth - 1 : 0;
  remaining_ = nth > 0 ? times : 0;
  op_ = op;
  code_ = code;
}

void FaultyBackend::clear() { fail(0, Code::driver); }

void FaultyBackend::set_latency(Op op, std::uint64_t microseconds) {
  latency_us_[static_cast<std::size_t>(op)] = microseconds;
}

std::uint64_t FaultyBackend::calls() const {
  std::uint64_t sum = 0;
  for (const auto& count : calls_) sum += count;
  return sum;
}

Status FaultyBackend::before(Op op) {
  const auto index = static_cast<std::size_t>(op);
  ++calls_[index];
  if (const std::uint64_t us = latency_us_[index]; us > 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(us));
  }
  std::lock_guard lock(mutex_);
  if (remaining_ == 0 || (op_ && *op_ != op)) return {};
  if (skip_ > 0) {
    --skip_;
    return {};
  }
  --remaining_;
  return Status::error(code_, std::string("injected failure of ") + kOpNames[index]);
}

Status FaultyBackend::reserve(std::size_t bytes, Address* address) {
  if (Status s = before(Op::reserve); !s.ok()) return s;
  return inner_.reserve(bytes, address);
}

Status FaultyBackend::release_range(Address address, std::size_t bytes) {
  if (Status s = before(Op::release_range); !s.ok()) return s;
  return inner_.release_range(address, bytes);
}

Status FaultyBackend::create(std::size_t bytes, Page* page) {
  if (Status s = before(Op::create); !s.ok()) return s;
  return inner_.create(bytes, page);
}

Status FaultyBackend::destroy(Page page) {
  if (Status s = before(Op::destroy); !s.ok()) return s;
  return inner_.destroy(page);
}

Status FaultyBackend::map(Address address, std::size_t bytes, Page page) {
  if (Status s = before(Op::map); !s.ok()) return s;
  return inner_.map(address, bytes, page);
}

Status FaultyBackend::set_access(Address address, std::size_t bytes) {
  if (Status s = before(Op::set_access); !s.ok()) return s;
  return inner_.set_access(address, bytes);
}

Status FaultyBackend::unmap(Address address, std::size_t bytes) {
  if (Status s = before(Op::unmap); !s.ok()) return s;
  return inner_.unmap(address, bytes);
}

Status FaultyBackend::zero(Address address, std::size_t bytes) {
  if (Status s = before(Op::zero); !s.ok()) return s;
  return inner_.zero(address, bytes);
}

Status FaultyBackend::fence() {
  if (Status s = before(Op::fence); !s.ok()) return s;
  return inner_.fence();
}

Status FaultyBackend::memory_info(MemoryInfo* info) {
  if (Status s = before(Op::memory_info); !s.ok()) return s;
  return inner_.memory_info(info);
}

Status FaultyBackend::upload(Address to, const void* from, std::size_t bytes) {
  if (Status s = before(Op::upload); !s.ok()) return s;
  return inner_.upload(to, from, bytes);
}

Status FaultyBackend::download(void* to, Address from, std::size_t bytes) {
  if (Status s = before(Op::download); !s.ok()) return s;
  return inner_.download(to, from, bytes);
}

Status FaultyBackend::finish_copies() {
  if (Status s = before(Op::finish_copies); !s.ok()) return s;
  return inner_.finish_copies();
}

Status FaultyBackend::copies_before(std::uint64_t stream) {
  if (Status s = before(Op::copies_before); !s.ok()) return s;
  return inner_.copies_before(stream);
}

Status FaultyBackend::pin(void* memory, std::size_t bytes) {
  if (Status s = before(Op::pin); !s.ok()) return s;
  return inner_.pin(memory, bytes);
}

Status FaultyBackend::unpin(void* memory) {
  if (Status s = before(Op::unpin); !s.ok()) return s;
  return inner_.unpin(memory);
}

}  // namespace kvc
