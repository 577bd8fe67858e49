// SPDX-License-Identifier: Apache-2.0
// Members that die at every point of what they do: their bytes return and nobody is stuck.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../src/ledger_file.h"
#include "temp_dir.h"

namespace kvc {
namespace {

constexpr int64_t kCapacity = 1000;

// A child process that runs `body` and exits with 0 if that says true.
struct Child {
  explicit Child(const std::function<bool()>& body) {
    std::cout.flush();  // lest the child write it once more
    pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) _exit(body() ? 0 : 1);
  }
  ~Child() {
    if (pid > 0 && ::kill(pid, SIGKILL) == 0) waitpid(pid, nullptr, 0);
  }
  void kill_now() {
    REQUIRE(::kill(pid, SIGKILL) == 0);
    REQUIRE(waitpid(pid, nullptr, 0) == pid);
    pid = -1;
  }
  pid_t pid = -1;
};

// One byte from a child to its parent: "I am where you wanted me".
struct Signal {
  Signal() { REQUIRE(pipe2(ends, O_CLOEXEC) == 0); }
  ~Signal() {
    close(ends[0]);
    close(ends[1]);
  }
  void send() const { (void)!write(ends[1], "!", 1); }
  void wait() const {
    char byte = 0;
    REQUIRE(read(ends[0], &byte, 1) == 1);
  }
  int ends[2];
};

bool child_joins(const std::string& path, std::unique_ptr<Ledger>& ledger,
                 std::unique_ptr<Member>& member) {
  return Ledger::open(path, kCapacity, std::nullopt, ledger).ok() &&
         ledger->join("child", 0, member).ok();
}

[[noreturn]] void sleep_forever() {
  for (;;) pause();
}

// Whatever happened: the ledger works, and everything can be had again.
void check_all_returned(Ledger& ledger, int64_t all = kCapacity) {
  auto member = join(ledger, "heir");
  CHECK(lease(*member, all));
  REQUIRE(member->leave().ok());
  CHECK(available(ledger) == static_cast<uint64_t>(all));
}

TEST_CASE("a member killed in a loop of leases gives its bytes back, hundreds of times") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  for (int round = 0; round < 200; ++round) {
    const Signal ready;
    std::vector<std::unique_ptr<Child>> children;
    for (int i = 0; i < 2; ++i) {
      children.push_back(std::make_unique<Child>([&] {
        std::unique_ptr<Ledger> own;
        std::unique_ptr<Member> member;
        if (!child_joins(dir.ledger(), own, member)) return false;
        ready.send();
        for (;;) {
          bool granted = false;
          if (!member->lease(300, granted).ok()) return false;
          if (granted && !member->release(299).ok()) return false;
          if (!member->add_committed(1).ok()) return false;
          uint64_t soft = 0;
          uint64_t running = 0;
          uint64_t version = 0;
          PolicyChange change;
          change.guarantee = granted ? 100 : 0;
          if (!member->set_demand(500, 1).ok() || !member->ask(soft, running).ok() ||
              !member->set_demand(0).ok() ||
              !own->set_policy(member->slot(), member->generation(), change, version).ok() ||
              !own->trim(member->slot(), member->generation(), -1, true, version).ok()) {
            return false;
          }
        }
      }));
    }
    ready.wait();
    std::this_thread::sleep_for(std::chrono::microseconds(round * 7 % 500));
    for (auto& child : children) child->kill_now();
    check_all_returned(*ledger);
  }
}

TEST_CASE("a member killed inside the critical section holds nobody up") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  const Signal ready;
  Child child([&] {
    std::unique_ptr<Ledger> own;
    std::unique_ptr<Member> member;
    bool granted = false;
    if (!child_joins(dir.ledger(), own, member) || !member->lease(700, granted).ok()) return false;
    ledger::LockFd holder;
    if (holder.open(AT_FDCWD, dir.ledger().c_str(), O_RDWR) != 0) return false;
    if (holder.try_lock(ledger::kMutexByte, true) != 0) return false;
    ready.send();
    sleep_forever();
  });
  ready.wait();
  std::thread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    ::kill(child.pid, SIGKILL);
  });
  check_all_returned(*ledger);  // waits in the lock, then goes on
  killer.join();
}

TEST_CASE("who was stopped while it waited has as much patience left") {
  using std::chrono::milliseconds;
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  const Signal joined;
  const Signal held;
  Child child([&] {
    std::unique_ptr<Ledger> own;
    std::unique_ptr<Member> member;
    if (!child_joins(dir.ledger(), own, member)) return false;
    joined.send();
    held.wait();
    ledger::Section::patience = milliseconds(1000);
    bool granted = false;
    return member->lease(1, granted).ok() && granted;
  });
  joined.wait();
  ledger::LockFd holder;
  REQUIRE(holder.open(AT_FDCWD, dir.ledger().c_str(), O_RDWR) == 0);
  REQUIRE(holder.try_lock(ledger::kMutexByte, true) == 0);
  held.send();
  std::this_thread::sleep_for(milliseconds(20));
  REQUIRE(::kill(child.pid, SIGSTOP) == 0);
  std::this_thread::sleep_for(milliseconds(1500));
  REQUIRE(::kill(child.pid, SIGCONT) == 0);
  std::this_thread::sleep_for(milliseconds(20));
  holder.close();
  int status = 0;
  REQUIRE(waitpid(child.pid, &status, 0) == child.pid);
  child.pid = -1;
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

// Lets a traced child run `steps` steps from its first stop. Returns how many it took; fewer if it
// ended before.
int64_t step(const Child& child, __ptrace_request how, int64_t steps) {
  int status = 0;
  for (int64_t taken = 0;; ++taken) {
    const pid_t stopped = waitpid(child.pid, &status, 0);
    if (stopped != child.pid || WIFSIGNALED(status)) FAIL("the child broke while it was traced");
    if (WIFEXITED(status)) {
      CHECK(WEXITSTATUS(status) == 0);
      return taken - 1;
    }
    if (taken == steps) return taken;
    if (ptrace(how, child.pid, nullptr, nullptr) != 0) FAIL("the child cannot be stepped");
  }
}

bool can_trace() {
  const pid_t child = fork();
  if (child == 0) _exit(ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) == 0 ? 0 : 1);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  if (status == 0) return true;
  MESSAGE("tracing is not allowed here");
  return false;
}

bool stop_for_tracer() {
  return ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) == 0 && raise(SIGSTOP) == 0;
}

TEST_CASE("a process may die at any system call, from creating the ledger to leaving it") {
  if (!can_trace()) return;
  bool stopped = true;
  int calls = 0;
  for (; stopped; ++calls) {
    REQUIRE(calls < 5000);
    const TempDir dir;
    const bool exists = calls % 2 == 1;  // created by somebody else before, or by the child
    std::unique_ptr<Ledger> before;
    if (exists) before = open_ledger(dir.ledger(), kCapacity);
    Child child([&] {
      if (!stop_for_tracer()) return false;
      std::unique_ptr<Ledger> own;
      std::unique_ptr<Member> member;
      std::unique_ptr<Member> worker;
      bool granted = false;
      uint64_t version = 0;
      PolicyChange change;
      change.limit = 300;
      return child_joins(dir.ledger(), own, member) && member->lease(600, granted).ok() &&
             granted && member->release(100).ok() && member->set_demand(900).ok() &&
             own->set_policy(member->slot(), member->generation(), change, version).ok() &&
             own->note("preempt", member->slot(), 1).ok() &&
             own->attach(member->slot(), member->generation(), worker).ok() &&
             member->leave().ok() && worker->leave().ok();
    });
    stopped = step(child, PTRACE_SYSCALL, calls) == calls;
    if (stopped) {
      child.kill_now();
    } else {
      child.pid = -1;  // it has ended
    }
    auto ledger = open_ledger(dir.ledger(), kCapacity);
    check_all_returned(*ledger);
    if (before != nullptr) check_all_returned(*before);
  }
  CHECK(calls > 50);
}

// Instructions that a sanitizer adds would only make the steps many times more.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_CASE("a member may die at any instruction of a lease, a release or a departure") {
  if (!can_trace()) return;
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  auto witness = join(*ledger, "witness");
  REQUIRE(lease(*witness, 100));
  const auto operate = [](Ledger& own) {
    std::unique_ptr<Member> member;
    bool granted = false;
    uint64_t version = 0;
    PolicyChange change;
    change.limit = 500;
    change.guarantee = 400;
    return own.join("child", 0, member).ok() && member->lease(900, granted).ok() && granted &&
           member->release(1).ok() && member->set_demand(50).ok() &&
           own.set_policy(member->slot(), member->generation(), change, version).ok() &&
           member->leave().ok();
  };
  const auto body = [&] {
    std::unique_ptr<Ledger> own;
    // Once before, so that the dynamic linker's work is not stepped through.
    return Ledger::open(dir.ledger(), kCapacity, std::nullopt, own).ok() && operate(*own) &&
           stop_for_tracer() && operate(*own);
  };
  int64_t total = 0;
  {
    Child child(body);
    total = step(child, PTRACE_SINGLESTEP, std::numeric_limits<int64_t>::max());
    child.pid = -1;  // it has ended
  }
  REQUIRE(total > 1000);
  // Spread over the whole, different ones every time; a step is a few microseconds.
  constexpr int kRounds = 16;
  int killed = 0;
  std::mt19937_64 random(std::random_device{}());
  for (int round = 0; round < kRounds; ++round) {
    const int64_t steps = (total * round + static_cast<int64_t>(random() % total)) / kRounds;
    CAPTURE(steps);
    Child child(body);
    if (step(child, PTRACE_SINGLESTEP, steps) == steps) {
      child.kill_now();
      ++killed;
    } else {
      child.pid = -1;  // it has ended: no two runs take quite as many steps
    }
    CHECK(lease(*witness, 900));
    std::vector<LedgerEvent> events;
    REQUIRE(ledger->events(0, events).ok());
    for (size_t i = 1; i < events.size(); ++i) CHECK(events[i - 1].seq < events[i].seq);
    REQUIRE(witness->release(900).ok());
    CHECK(leased(*ledger) == 100);
  }
  CHECK(killed >= kRounds - 1);
}
#endif

TEST_CASE("who creates the ledger does not matter, when many do at once") {
  for (int round = 0; round < 40; ++round) {
    const TempDir dir;
    std::vector<std::unique_ptr<Child>> children;
    for (int i = 0; i < 6; ++i) {
      children.push_back(std::make_unique<Child>([&] {
        std::unique_ptr<Ledger> own;
        std::unique_ptr<Member> member;
        bool granted = false;
        return child_joins(dir.path + "/made/ledger", own, member) &&
               member->lease(100, granted).ok() && granted && own->capacity() == kCapacity;
      }));
    }
    for (auto& child : children) {
      int status = -1;
      REQUIRE(waitpid(child->pid, &status, 0) == child->pid);
      child->pid = -1;
      CHECK(status == 0);
    }
    auto ledger = open_ledger(dir.path + "/made/ledger", kCapacity);
    check_all_returned(*ledger);
  }
}

TEST_CASE("a member lives as long as any of its processes, and no longer") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  auto leader = join(*ledger, "leader");
  REQUIRE(lease(*leader, 500));
  const Signal ready;
  Child worker([&] {
    std::unique_ptr<Ledger> own;
    std::unique_ptr<Member> share;
    if (!Ledger::open(dir.ledger(), std::nullopt, std::nullopt, own).ok() ||
        !own->attach(leader->slot(), leader->generation(), share).ok()) {
      return false;
    }
    ready.send();
    sleep_forever();
  });
  ready.wait();
  leader.reset();
  CHECK(leased(*ledger) == 500);
  worker.kill_now();
  std::vector<MemberInfo> reaped;
  REQUIRE(ledger->reap(reaped).ok());
  REQUIRE(reaped.size() == 1);
  CHECK(reaped[0].name == "leader");
  CHECK(reaped[0].leased == 500);
  CHECK_FALSE(reaped[0].alive);
  CHECK(leased(*ledger) == 0);
}

TEST_CASE("what the driver still holds for the dead is not promised again") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  const Signal ready;
  Child child([&] {
    std::unique_ptr<Ledger> own;
    std::unique_ptr<Member> member;
    bool granted = false;
    if (!child_joins(dir.ledger(), own, member) || !member->lease(700, granted).ok() ||
        !member->add_committed(600).ok()) {
      return false;
    }
    ready.send();
    sleep_forever();
  });
  ready.wait();
  REQUIRE(ledger->set_device_used(650).ok());
  CHECK(ledger->external() == 50);
  CHECK(available(*ledger) == kCapacity - 750);
  child.kill_now();
  CHECK(available(*ledger) == kCapacity - 50);
  REQUIRE(ledger->set_device_used(650).ok());  // its context is not torn down yet
  CHECK(available(*ledger) == kCapacity - 650);
  REQUIRE(ledger->set_device_used(50).ok());
  check_all_returned(*ledger, kCapacity - 50);
}

TEST_CASE("a child that outlives a member does not keep it alive") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  const Signal ready;
  const Signal end;  // its readers see the end of file once the parent closes it
  Child child([&] {
    std::unique_ptr<Ledger> own;
    std::unique_ptr<Member> member;
    bool granted = false;
    if (!child_joins(dir.ledger(), own, member) || !member->lease(700, granted).ok()) return false;
    if (fork() == 0) {
      close(end.ends[1]);
      ready.send();
      char byte = 0;
      (void)!read(end.ends[0], &byte, 1);
      _exit(0);
    }
    sleep_forever();
  });
  ready.wait();
  child.kill_now();
  check_all_returned(*ledger);
}

TEST_CASE("a member that runs another program has left") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  Signal out;
  Child child([&] {
    std::unique_ptr<Ledger> own;
    std::unique_ptr<Member> member;
    bool granted = false;
    if (!child_joins(dir.ledger(), own, member) || !member->lease(700, granted).ok()) return false;
    dup2(out.ends[1], STDOUT_FILENO);
    execl("/bin/sh", "sh", "-c", "echo; exec sleep 100", nullptr);
    return false;
  });
  out.wait();
  check_all_returned(*ledger);
}

TEST_CASE("a member in another PID namespace is noticed dead") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity);
  auto here = join(*ledger, "here");
  const Signal ready;
  Child outer([&]() -> bool {
    if (unshare(CLONE_NEWPID) != 0) {
      ready.send();
      sleep_forever();
    }
    const pid_t inner = fork();  // process 1 of its namespace
    if (inner == 0) {
      std::unique_ptr<Ledger> own;
      std::unique_ptr<Member> member;
      bool granted = false;
      if (!child_joins(dir.ledger(), own, member) || !member->lease(700, granted).ok()) _exit(1);
      ready.send();
      sleep_forever();
    }
    sleep_forever();
  });
  ready.wait();
  std::vector<MemberInfo> infos;
  REQUIRE(ledger->members(infos).ok());
  if (infos.size() == 1) {
    MESSAGE("only root can make a PID namespace");
    return;
  }
  CHECK(infos.at(1).pid == 1);
  CHECK(infos.at(1).alive);
  CHECK_FALSE(lease(*here, 301));
  // Reaches the process inside by its name out here: the only child of `outer`.
  std::string name =
      "/proc/" + std::to_string(outer.pid) + "/task/" + std::to_string(outer.pid) + "/children";
  FILE* file = fopen(name.c_str(), "r");
  REQUIRE(file != nullptr);
  int inner = 0;
  REQUIRE(fscanf(file, "%d", &inner) == 1);
  fclose(file);
  REQUIRE(::kill(inner, SIGKILL) == 0);
  // Its parent never waits for it, so it stays a zombie; its files are closed all the same.
  bool granted = false;
  for (int i = 0; i < 1000 && !granted; ++i) {
    granted = lease(*here, 301);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(granted);
}

}  // namespace
}  // namespace kvc
