// SPDX-License-Identifier: Apache-2.0
#include "ledger_policy.h"

#include <algorithm>

namespace kvc::ledger {
namespace {

uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }
uint64_t above_zero(Wide x) { return x > 0 ? static_cast<uint64_t>(x) : 0; }
uint64_t over(const View& v) { return less(v.leased, v.guarantee); }

// over(a) / weight(a) < over(b) / weight(b)
bool less_pressed(const View& a, const View& b) {
  return Wide{over(a)} * b.weight < Wide{over(b)} * a.weight;
}

// The state of one planning run: what each victim still has, and what is free for the next.
class Planner {
 public:
  Planner(const State& state, Asks& asks) : state_(state), asks_(asks), free_(state.avail) {
    for (int i = 0; i < state_.count; ++i) {
      const View& v = state_.members[i];
      asks_[i] = {};
      Stock& stock = stock_[i];
      stock.parked = std::min(v.parked, held(v));
      stock.cached = std::min(v.cached, held(v) - stock.parked);
      stock.running = less(held(v) - stock.parked - stock.cached, v.pinned);
      floor_[i] = floor_of(v);
      floors_ += floor_[i];
      free_ += v.returning;
      victims_[i] = i;
    }
    std::sort(victims_.begin(), victims_.begin() + state_.count, [&](int a, int b) {
      const View& x = state_.members[a];
      const View& y = state_.members[b];
      if (less_pressed(y, x)) return true;
      if (less_pressed(x, y)) return false;
      if (x.idle_ns != y.idle_ns) return x.idle_ns > y.idle_ns;
      return x.slot < y.slot;
    });
  }

  void run() {
    for (int i = 0; i < state_.count; ++i) enforce_limit(i);
    if (free_ < 0) {
      uint64_t need = above_zero(-free_);
      for (uint64_t Stock::* kind : kKinds) {
        for (int k = 0; k < state_.count; ++k) {
          const int v = victims_[k];
          if (!state_.members[v].passed) need -= take(v, kind, need, kForOverdraft);
        }
      }
      free_ = -static_cast<Wide>(need);
    }
    std::array<int, kSlots> demanders;
    int count = 0;
    for (int i = 0; i < state_.count; ++i) {
      if (want(state_.members[i]) != 0) demanders[count++] = i;
    }
    std::sort(demanders.begin(), demanders.begin() + count,
              [&](int a, int b) { return served_first(state_.members[a], state_.members[b]); });
    for (int k = 0; k < count; ++k) serve(demanders[k]);
  }

 private:
  struct Stock {
    uint64_t parked;
    uint64_t cached;
    uint64_t running;
  };
  static constexpr uint64_t Stock::* kKinds[] = {&Stock::parked, &Stock::cached, &Stock::running};

  static bool served_first(const View& a, const View& b) {
    const bool a_starved = floor_of(a) != 0;
    if (const bool b_starved = floor_of(b) != 0; a_starved != b_starved) return a_starved;
    if (a.priority != b.priority) return a.priority > b.priority;
    if (less_pressed(a, b)) return true;
    if (less_pressed(b, a)) return false;
    return a.slot < b.slot;
  }

  // Asks v for up to `most` of one kind, never below its guarantee.
  uint64_t take(int v, uint64_t Stock::* kind, uint64_t most, int cause) {
    const View& view = state_.members[v];
    Ask& ask = asks_[v];
    const uint64_t room = less(held(view), ask.total() + view.guarantee);
    const uint64_t taken = std::min({stock_[v].*kind, most, room});
    if (taken == 0) return 0;
    if (ask.total() == 0) ask.cause = cause;
    stock_[v].*kind -= taken;
    (kind == &Stock::running ? ask.running : ask.soft) += taken;
    return taken;
  }

  // Nobody else can bring a member back to its limit, so one that was passed over stays asked.
  void enforce_limit(int v) {
    const View& view = state_.members[v];
    uint64_t excess = less(held(view), view.limit);
    for (uint64_t Stock::* kind : kKinds) excess -= take(v, kind, excess, kForLimit);
    if (!view.passed) free_ += asks_[v].total();
  }

  void serve(int d) {
    const View& demander = state_.members[d];
    const uint64_t wanted = want(demander);
    const uint64_t floor = floor_[d];
    const uint64_t of_all = above_zero(free_ - (floors_ - floor));
    const uint64_t of_floor = std::min(above_zero(free_), floor);
    const uint64_t given = std::min(wanted, std::max(of_all, of_floor));
    free_ -= given;
    floors_ -= std::min(given, floor);
    floor_[d] -= std::min(given, floor);

    uint64_t need = wanted - given;
    uint64_t starved = less(std::min(wanted, floor), given);  // of need, what it is guaranteed
    for (uint64_t Stock::* kind : kKinds) {
      for (int k = 0; k < state_.count && need != 0; ++k) {
        const int v = victims_[k];
        const View& victim = state_.members[v];
        if (v == d || victim.passed) continue;
        const bool all = kind == &Stock::running
                             ? demander.priority > victim.priority
                             : victim.demand == 0 || ranks_before(demander, victim);
        const uint64_t taken = take(v, kind, all ? need : starved, demander.slot);
        need -= taken;
        starved = less(starved, taken);
      }
    }
  }

  const State& state_;
  Asks& asks_;
  Wide free_;  // now or soon, and not yet planned for anyone; negative while there is an overdraft
  Wide floors_ = 0;
  std::array<uint64_t, kSlots> floor_;
  std::array<Stock, kSlots> stock_;
  std::array<int, kSlots> victims_;
};

}  // namespace

uint64_t held(const View& v) { return less(v.leased, v.returning); }
uint64_t floor_of(const View& v) { return less(v.guarantee, v.leased); }
uint64_t want(const View& v) { return std::min(v.demand, less(v.limit, v.leased)); }

bool ranks_before(const View& d, const View& m) {
  if (d.priority != m.priority) return d.priority > m.priority;
  return Wide{over(d)} * m.weight * 10 < Wide{over(m)} * d.weight * 9;
}

uint64_t claimable(const State& state, int index, bool urgent) {
  const View& m = state.members[index];
  Wide for_others = 0;
  for (int i = 0; i < state.count; ++i) {
    if (i == index) continue;
    const View& other = state.members[i];
    const uint64_t floor = floor_of(other);
    for_others += floor;
    if (other.demand != 0 && (urgent ? other.priority > m.priority : ranks_before(other, m))) {
      for_others += less(want(other), floor);
    }
  }
  const Wide of_floor = std::min<Wide>(state.avail, floor_of(m));
  const uint64_t most = above_zero(std::max(of_floor, state.avail - for_others));
  return std::min(most, less(m.limit, m.leased));
}

void plan(const State& state, Asks& asks) { Planner(state, asks).run(); }

}  // namespace kvc::ledger
