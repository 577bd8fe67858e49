// SPDX-License-Identifier: Apache-2.0
// Who may lease how much, and who is asked for what: each rule, then all of them at random.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../src/ledger_policy.h"

namespace kvc::ledger {
namespace {

// A member with `leased` bytes, all of them in running requests, and the default policy.
View member(uint64_t leased) {
  View v = {};
  v.leased = leased;
  v.limit = kNone;
  v.weight = 100;
  return v;
}

View with(View v, uint64_t View::* field, uint64_t value) {
  v.*field = value;
  return v;
}

State state_of(uint64_t capacity, const std::vector<View>& members, int64_t non_kv = 0) {
  State state;
  state.avail = Wide{capacity} - non_kv;
  state.count = static_cast<int>(members.size());
  for (int i = 0; i < state.count; ++i) {
    state.members[i] = members[i];
    state.members[i].slot = i;
    state.avail -= members[i].leased;
  }
  return state;
}

Asks plan_of(const State& state) {
  Asks asks;
  plan(state, asks);
  return asks;
}

void check_ask(const Ask& ask, uint64_t soft, uint64_t running) {
  CHECK(ask.soft == soft);
  CHECK(ask.running == running);
}

TEST_CASE("without a policy all that is available may be claimed by anyone") {
  const State state = state_of(1000, {member(300), member(100)}, 50);
  CHECK(claimable(state, 0) == 550);
  CHECK(claimable(state, 1) == 550);
}

TEST_CASE("what is pinned is asked for by nobody") {
  const View urgent = with(with(member(0), &View::demand, 500), &View::priority, 1);
  View low = with(member(100), &View::pinned, 30);
  CHECK(plan_of(state_of(100, {low, urgent}))[0].running == 70);
  low.pinned = 100;
  check_ask(plan_of(state_of(100, {low, urgent}))[0], 0, 0);
  check_ask(plan_of(state_of(50, {low}))[0], 0, 0);  // nor for an overdraft
  low.limit = 40;
  check_ask(plan_of(state_of(100, {low}))[0], 0, 0);  // nor for its own limit
  low.parked = 20;                                    // pinned is of the rest
  CHECK(plan_of(state_of(100, {low, urgent}))[0].soft == 20);
}

TEST_CASE("a limit bounds what may be claimed") {
  View a = with(member(300), &View::limit, 350);
  CHECK(claimable(state_of(1000, {a}), 0) == 50);
  a.limit = 300;
  CHECK(claimable(state_of(1000, {a}), 0) == 0);
  a.limit = 200;
  CHECK(claimable(state_of(1000, {a}), 0) == 0);
}

TEST_CASE("what others are guaranteed is kept free, but not from its owner") {
  const View owner = with(member(100), &View::guarantee, 400);
  const State state = state_of(1000, {member(200), owner});
  CHECK(claimable(state, 0) == 400);
  CHECK(claimable(state, 1) == 700);
  // Two guarantees that foreign memory has eaten into: first come, first served.
  const View other = with(member(0), &View::guarantee, 500);
  const State tight = state_of(1000, {owner, other}, 700);
  CHECK(claimable(tight, 0) == 200);
  CHECK(claimable(tight, 1) == 200);
}

TEST_CASE("who ranks before is left what it waits for") {
  View d = with(member(100), &View::demand, 250);
  View m = member(300);
  CHECK(claimable(state_of(1000, {m, d}), 0) == 350);  // far less pressed
  CHECK(claimable(state_of(1000, {m, d}), 1) == 600);
  d.leased = 280;  // nearly as pressed
  CHECK(claimable(state_of(1000, {m, d}), 0) == 420);
  d.priority = 1;
  CHECK(claimable(state_of(1000, {m, d}), 0) == 170);
  m.priority = 2;
  CHECK(claimable(state_of(1000, {m, d}), 0) == 420);
  m.priority = 0;
  d.limit = 300;  // and so may have 20 only
  CHECK(claimable(state_of(1000, {m, d}), 0) == 400);
  d.limit = kNone;
  d.guarantee = 480;  // 200 of the demand is its guarantee already
  CHECK(claimable(state_of(1000, {m, d}), 0) == 170);
}

TEST_CASE("what is urgent is kept from guarantees and higher priorities only") {
  View d = with(member(100), &View::demand, 250);
  View m = member(300);
  CHECK(claimable(state_of(1000, {m, d}), 0, true) == 600);
  d.guarantee = 300;
  CHECK(claimable(state_of(1000, {m, d}), 0, true) == 400);
  d.priority = 1;
  CHECK(claimable(state_of(1000, {m, d}), 0, true) == 350);
  m.limit = 310;
  CHECK(claimable(state_of(1000, {m, d}), 0, true) == 10);
}

TEST_CASE("rank is by priority, then by what is held above the guarantee, per weight") {
  View a = member(100);
  View b = member(200);
  CHECK(ranks_before(a, b));
  CHECK_FALSE(ranks_before(b, a));
  b.weight = 200;
  CHECK_FALSE(ranks_before(a, b));
  CHECK_FALSE(ranks_before(b, a));
  b.weight = 300;
  CHECK(ranks_before(b, a));
  a.guarantee = 100;
  CHECK(ranks_before(a, b));
  b.priority = 1;
  CHECK(ranks_before(b, a));
  const View huge = with(member(kMaxBytes), &View::weight, kMaxWeight);
  CHECK(ranks_before(huge, member(kMaxBytes)));  // the products do not wrap
}

TEST_CASE("a member above its limit is asked, softly first") {
  View v = member(500);
  v.parked = 50;
  v.cached = 100;
  v.limit = 450;
  check_ask(plan_of(state_of(1000, {v}))[0], 50, 0);
  v.limit = 300;
  check_ask(plan_of(state_of(1000, {v}))[0], 150, 50);
  CHECK(plan_of(state_of(1000, {v}))[0].cause == kForLimit);
  v.returning = 180;
  check_ask(plan_of(state_of(1000, {v}))[0], 20, 0);
  v.returning = 0;
  v.passed = true;  // nobody else can do it
  check_ask(plan_of(state_of(1000, {v}))[0], 150, 50);
}

TEST_CASE("an overdraft is asked of the most pressed, and everything soft goes first") {
  View a = member(400);
  View b = member(300);
  b.cached = 80;
  const State state = state_of(1000, {a, b}, 400);  // 100 too many
  check_ask(plan_of(state)[0], 0, 20);
  check_ask(plan_of(state)[1], 80, 0);
  CHECK(plan_of(state)[0].cause == kForOverdraft);
  a.guarantee = 390;
  check_ask(plan_of(state_of(1000, {a, b}, 400))[0], 0, 0);
  check_ask(plan_of(state_of(1000, {a, b}, 400))[1], 80, 20);
  b.passed = true;
  check_ask(plan_of(state_of(1000, {a, b}, 400))[0], 0, 10);
  a = with(member(400), &View::returning, 100);  // on its way
  b.passed = false;
  check_ask(plan_of(state_of(1000, {a, b}, 400))[1], 0, 0);
}

TEST_CASE("a demander gets parked, then cached bytes, of those who do not wait or rank after") {
  View v = member(800);
  v.parked = 50;
  v.cached = 300;
  View w = with(member(100), &View::parked, 30);
  View d = with(member(0), &View::demand, 200);
  const State state = state_of(1000, {v, w, d});  // 100 are free
  check_ask(plan_of(state)[0], 70, 0);            // 50 parked, and 20 cached
  check_ask(plan_of(state)[1], 30, 0);            // its parked bytes before others' cached
  CHECK(plan_of(state)[0].cause == 2);
  // Never running requests, for a demander of the same priority.
  d.demand = 1000;
  check_ask(plan_of(state_of(1000, {v, w, d}))[0], 350, 0);
  // Nothing that is free or on its way is asked for.
  v.returning = 100;
  d.demand = 200;
  check_ask(plan_of(state_of(1000, {v, w, d}))[0], 0, 0);
  v.returning = 0;
  // A victim that waits itself gives only to those who rank before it.
  v.demand = 10;
  check_ask(plan_of(state_of(1000, {v, w, d}))[0], 70, 0);
  d.leased = 800;
  v.leased = w.leased = 100;
  v.parked = v.cached = 50;
  check_ask(plan_of(state_of(1000, {v, w, d}))[0], 0, 0);
  v.demand = 0;
  CHECK(plan_of(state_of(1000, {v, w, d}))[0].total() == 100);
}

TEST_CASE("a victim keeps its guarantee") {
  View v = with(member(800), &View::cached, 700);
  v.guarantee = 750;
  const View d = with(member(200), &View::demand, 100);
  check_ask(plan_of(state_of(1000, {v, d}))[0], 50, 0);
  v.returning = 30;
  check_ask(plan_of(state_of(1000, {v, d}))[0], 20, 0);
}

TEST_CASE("running requests go for a higher priority, or for a guarantee") {
  View v = with(member(900), &View::guarantee, 300);
  v.cached = 100;
  View d = with(member(100), &View::demand, 400);
  d.priority = 1;
  check_ask(plan_of(state_of(1000, {v, d}))[0], 100, 300);
  d.demand = 700;
  check_ask(plan_of(state_of(1000, {v, d}))[0], 100, 500);  // down to the guarantee
  d.priority = 0;
  d.guarantee = 250;
  check_ask(plan_of(state_of(1000, {v, d}))[0], 100, 50);  // what is missing of 250
  v.priority = 9;                                          // a guarantee is one
  check_ask(plan_of(state_of(1000, {v, d}))[0], 100, 50);
  v.demand = 5;  // and of one that waits and ranks before, no more than that
  v.cached = 200;
  check_ask(plan_of(state_of(1000, {v, d}))[0], 150, 0);
}

TEST_CASE("each byte is promised to one demander") {
  const View v = with(member(900), &View::cached, 500);
  const View d = with(member(50), &View::demand, 100);
  const View e = with(member(20), &View::demand, 100);
  const State state = state_of(1000, {v, d, e});  // 30 are free
  check_ask(plan_of(state)[0], 170, 0);
  // The floor of one that does not wait is no one's.
  const View idle = with(member(0), &View::guarantee, 30);
  check_ask(plan_of(state_of(1000, {v, d, e, idle}))[0], 200, 0);
}

TEST_CASE("a floor that is given out is kept free no longer") {
  const View v = with(member(850), &View::cached, 500);
  const View d = with(with(member(0), &View::guarantee, 100), &View::demand, 100);
  const View e = with(member(0), &View::demand, 100);
  check_ask(plan_of(state_of(1000, {v, d, e}))[0], 50, 0);
}

TEST_CASE("among equals the longest idle is asked, and who was passed over is not") {
  View v = with(member(400), &View::cached, 400);
  View w = v;
  const View d = with(member(0), &View::demand, 300);
  v.idle_ns = 5;
  w.idle_ns = 6;
  check_ask(plan_of(state_of(800, {v, w, d}))[0], 0, 0);
  check_ask(plan_of(state_of(800, {v, w, d}))[1], 300, 0);
  w.passed = true;
  check_ask(plan_of(state_of(800, {v, w, d}))[0], 300, 0);
  check_ask(plan_of(state_of(800, {v, w, d}))[1], 0, 0);
}

TEST_CASE("like members that both wait take nothing from each other") {
  for (int64_t tilt = -40; tilt <= 40; tilt += 8) {
    View a = with(member(static_cast<uint64_t>(1000 + tilt)), &View::demand, 200);
    View b = with(member(static_cast<uint64_t>(1000 - tilt)), &View::demand, 200);
    a.cached = b.cached = 500;
    const Asks asks = plan_of(state_of(2000, {a, b}));
    CHECK(asks[0].total() == 0);
    CHECK(asks[1].total() == 0);
  }
}

TEST_CASE("two members in permanent contention settle") {
  View a = with(member(1900), &View::demand, 400);
  View b = with(member(100), &View::demand, 400);
  uint64_t moved = 0;
  int last = 0;
  for (int round = 0; round < 500; ++round) {
    a.cached = a.leased;  // whatever they hold could go
    b.cached = b.leased;
    State state = state_of(2000, {a, b});
    const Asks asks = plan_of(state);
    CHECK((asks[0].total() == 0 || asks[1].total() == 0));
    for (View* v : {&a, &b}) {
      const uint64_t given = std::min<uint64_t>(asks[v == &a ? 0 : 1].total(), 16);
      v->leased -= given;
      moved += given;
      if (given != 0) last = round;
    }
    for (const int i : {round % 2, 1 - round % 2}) {
      View& v = i == 0 ? a : b;
      state = state_of(2000, {a, b});
      v.leased += std::min<uint64_t>(claimable(state, i), v.demand);
    }
  }
  CHECK(moved < 1200);
  CHECK(last < 100);
  CHECK(b.leased > 850);
  CHECK(a.leased + b.leased == 2000);
}

State random_state(std::mt19937_64& random, bool overdrawn) {
  const auto up_to = [&](uint64_t most) { return most == 0 ? 0 : random() % (most + 1); };
  State state;
  state.count = static_cast<int>(1 + up_to(7));
  uint64_t leased = 0;
  for (int i = 0; i < state.count; ++i) {
    View v = member(up_to(3) == 0 ? 0 : up_to(500));
    v.slot = i;
    v.returning = up_to(3) == 0 ? up_to(v.leased) : 0;
    v.parked = up_to(v.leased);  // with the two more than is leased: members report on their own
    v.cached = up_to(v.leased);
    v.guarantee = up_to(1) == 0 ? up_to(400) : 0;
    if (up_to(2) == 0) v.limit = v.guarantee + up_to(400);
    v.weight = 1 + up_to(3) * 100;
    v.priority = up_to(2);
    v.demand = up_to(1) == 0 ? up_to(600) : 0;
    v.idle_ns = static_cast<int64_t>(up_to(3));
    v.passed = up_to(5) == 0;
    leased += v.leased;
    state.members[i] = v;
  }
  state.avail = static_cast<int64_t>(up_to(600)) - (overdrawn ? static_cast<int64_t>(leased) : 0);
  return state;
}

TEST_CASE("asks, at random: no more than is held, never below a guarantee, each for a reason") {
  std::mt19937_64 random(1);
  for (int round = 0; round < 200'000; ++round) {
    const State state = random_state(random, round % 3 == 0);
    CAPTURE(round);
    const Asks asks = plan_of(state);
    bool limits = false;
    bool demand = false;
    Wide wanted = 0;
    Wide taken = 0;
    for (int i = 0; i < state.count; ++i) {
      const View& v = state.members[i];
      limits = limits || held(v) > v.limit;
      demand = demand || want(v) != 0;
      wanted += want(v) + (held(v) > v.limit ? held(v) - v.limit : 0);
      taken += asks[i].total();
    }
    if (state.avail < 0) wanted -= state.avail;
    if (taken > wanted) FAIL_CHECK("more is asked than anyone needs");
    for (int i = 0; i < state.count; ++i) {
      const View& v = state.members[i];
      const Ask& ask = asks[i];
      if (ask.total() == 0) continue;
      if (ask.total() > held(v)) FAIL_CHECK("asked for more than it holds");
      if (held(v) - ask.total() < v.guarantee) FAIL_CHECK("asked below its guarantee");
      if (ask.soft > v.parked + v.cached) FAIL_CHECK("asked for more soft bytes than it has");
      if (v.passed && ask.total() > held(v) - std::min(held(v), v.limit)) {
        FAIL_CHECK("asked though passed over");
      }
      if (!limits && !demand && state.avail >= 0) FAIL_CHECK("asked for nothing");
      if (ask.running != 0 && held(v) <= v.limit && state.avail >= 0) {
        bool right = false;
        for (int d = 0; d < state.count; ++d) {
          const View& other = state.members[d];
          right = right || (d != i && want(other) != 0 &&
                            (other.priority > v.priority || floor_of(other) != 0));
        }
        if (!right) FAIL_CHECK("asked for running requests by one of no higher priority");
      }
    }
  }
}

TEST_CASE("claims, at random and in any order, never exceed what is there") {
  std::mt19937_64 random(2);
  for (int round = 0; round < 50'000; ++round) {
    State state = random_state(random, false);
    CAPTURE(round);
    Wide floors = 0;
    for (int i = 0; i < state.count; ++i) floors += floor_of(state.members[i]);
    const bool fit = floors <= state.avail;
    for (int k = 0; k < 20; ++k) {
      const auto i = static_cast<int>(random() % static_cast<uint64_t>(state.count));
      View& v = state.members[i];
      const uint64_t most = claimable(state, i);
      if (most > std::max<uint64_t>(v.limit, v.leased) - v.leased) FAIL_CHECK("beyond its limit");
      if (fit && most < floor_of(v)) FAIL_CHECK("a guarantee that fits is not given");
      const uint64_t claim = most == 0 ? 0 : random() % (most + 1);
      v.leased += claim;
      state.avail -= claim;
      if (state.avail < 0) FAIL_CHECK("more was promised than there is");
    }
  }
}

TEST_CASE("the largest numbers a file may hold do not wrap") {
  State state;
  state.count = kSlots;
  state.avail = -(Wide{1} << 63);
  for (int i = 0; i < kSlots; ++i) {
    View v = member(kMaxBytes);
    v.slot = i;
    v.returning = i % 2 == 0 ? kMaxBytes : 0;
    v.parked = v.cached = v.demand = kMaxBytes;
    v.guarantee = i % 3 == 0 ? kMaxBytes : 0;
    v.leased = i % 5 == 0 ? 0 : kMaxBytes;
    state.members[i] = v;
  }
  const Asks asks = plan_of(state);
  for (int i = 0; i < kSlots; ++i) {
    CHECK(claimable(state, i) == 0);
    CHECK(asks[i].total() <= kMaxBytes);
  }
}

}  // namespace
}  // namespace kvc::ledger
