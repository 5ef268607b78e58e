// Longer than other files, and one class: every function here keeps the same invariants of page
// table, slots, barrier, recency lists and counters, which a reader has to see together.
#include "planner.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "wide.h"

namespace vmo {

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Keys scanned at a time for a victim; small enough that few are looked at one by one.
constexpr int32_t kBlock = 64;
// With so many experts per id, sorting ids is faster than looking at a mark for each expert.
constexpr int64_t kSparse = 16;

// Where the first block of keys from `begin` on starts in which score + barrier is less than
// `threshold` somewhere; `end` if there is none. Whole blocks without a branch, so that wide
// vectors can look: most of a large model's keys are passed over here.
VMO_WIDE int32_t first_block_below(const float* scores, const float* barrier, int32_t begin,
                                   int32_t end, float threshold) {
  int32_t block = begin;
  for (; block + kBlock <= end; block += kBlock) {
    const float* score = scores + block;
    const float* added = barrier + block;
    int32_t num_below = 0;
    for (int32_t i = 0; i < kBlock; ++i) {
      num_below += static_cast<int32_t>(score[i] + added[i] < threshold);
    }
    if (num_below != 0) return block;
  }
  for (int32_t i = block; i < end; ++i) {
    if (scores[i] + barrier[i] < threshold) return block;
  }
  return end;
}

}  // namespace

Planner::Planner(const PlannerConfig& config) : config_(config) {
  require(config.num_layers > 0,
          "num_layers must be positive, got " + std::to_string(config.num_layers));
  require(config.num_experts > 0,
          "num_experts must be positive, got " + std::to_string(config.num_experts));
  require(config.num_slots >= 0 && config.num_staging_slots >= 0,
          "num_slots and num_staging_slots must not be negative, got " +
              std::to_string(config.num_slots) + " and " +
              std::to_string(config.num_staging_slots));
  const int64_t all = static_cast<int64_t>(config.num_layers) * config.num_experts;
  require(all <= std::numeric_limits<int32_t>::max(),
          "num_layers * num_experts must fit in 31 bits, got " + std::to_string(all));

  // Everything fits: (layer, expert) gets slot layer * num_experts + expert, so that each
  // layer's slots are one contiguous view in logical order and ids need no remapping.
  fixed_slots_ = config.num_slots >= all;
  slots_.resize(static_cast<size_t>(config.num_slots) +
                static_cast<size_t>(config.num_staging_slots));
  page_table_.assign(static_cast<size_t>(all), -1);
  scores_.assign(static_cast<size_t>(all), 0.0F);
  last_use_.assign(static_cast<size_t>(all), 0);
  barrier_.assign(static_cast<size_t>(all), kInfinity);
  needed_.assign(static_cast<size_t>(config.num_experts), 0);

  const auto num_experts = static_cast<size_t>(config.num_experts);
  plan_.experts.reserve(num_experts);
  plan_.slots.reserve(num_experts);
  plan_.miss_experts.reserve(num_experts);
  plan_.miss_slots.reserve(num_experts);
  plan_.miss_kinds.reserve(num_experts);

  const int32_t num_pools = config.scope == Scope::kPerLayer ? config.num_layers : 1;
  slots_per_pool_ = config.num_slots / num_pools;
  occupied_.assign(static_cast<size_t>(num_pools), 0);
  const auto num_slots = static_cast<int32_t>(slots_.size());
  if (!fixed_slots_) {
    for (int32_t slot = num_slots - 1; slot >= 0; --slot) free_.push_back(slot);
  }
  if (config.order == Order::kRecency) {
    newer_.resize(slots_.size() + occupied_.size());
    std::iota(newer_.begin(), newer_.end(), 0);
    older_ = newer_;
  }
}

bool Planner::is_resident(int32_t layer, int32_t expert) const {
  const int32_t slot = slot_of(layer, expert);
  return slot >= 0 && slots_[static_cast<size_t>(slot)].state == SlotState::kResident;
}

PlannerView Planner::view() {
  PlannerView view{};
  view.scores = scores_.data();
  view.page_table = page_table_.data();
  view.last_use = last_use_.data();
  view.counters = &counters_;
  view.num_resident = &num_resident_;
  view.experts = plan_.experts.data();
  view.slots = plan_.slots.data();
  view.miss_experts = plan_.miss_experts.data();
  view.miss_slots = plan_.miss_slots.data();
  view.miss_kinds = plan_.miss_kinds.data();
  return view;
}

template <typename Id>
void Planner::collect_need(const Id* ids, int64_t num_ids) {
  const auto is_wrong = [this](Id id) {
    return (id < 0 && id != VMO_NO_EXPERT) || id >= config_.num_experts;
  };
  const Id* wrong = std::find_if(ids, ids + num_ids, is_wrong);
  if (wrong != ids + num_ids) {
    throw std::invalid_argument("expert id " + std::to_string(*wrong) + " at position " +
                                std::to_string(wrong - ids) + " is outside [0, " +
                                std::to_string(config_.num_experts) + ")");
  }
  plan_.experts.clear();
  if (num_ids * kSparse < config_.num_experts) {
    for (int64_t i = 0; i < num_ids; ++i) {
      if (ids[i] == VMO_NO_EXPERT) continue;
      plan_.experts.push_back(static_cast<int32_t>(ids[i]));
    }
    std::sort(plan_.experts.begin(), plan_.experts.end());
    plan_.experts.erase(std::unique(plan_.experts.begin(), plan_.experts.end()),
                        plan_.experts.end());
    return;
  }
  for (int64_t i = 0; i < num_ids; ++i) {
    if (ids[i] != VMO_NO_EXPERT) needed_[static_cast<size_t>(ids[i])] = 1;
  }
  for (int32_t e = 0; e < config_.num_experts; ++e) {
    if (needed_[static_cast<size_t>(e)] != 0) plan_.experts.push_back(e);
  }
  std::memset(needed_.data(), 0, needed_.size());
}

template void Planner::collect_need(const int32_t*, int64_t);
template void Planner::collect_need(const int64_t*, int64_t);

bool Planner::victim_is_less(int32_t a_key, int32_t b_key) const {
  const auto a = static_cast<size_t>(a_key);
  const auto b = static_cast<size_t>(b_key);
  if (scores_[a] != scores_[b]) return scores_[a] < scores_[b];
  return a_key < b_key;  // ties: (layer, expert)
}

bool Planner::outscores(int32_t key, int32_t victim_key) const {
  return scores_[static_cast<size_t>(key)] > scores_[static_cast<size_t>(victim_key)];
}

bool Planner::may_go(int32_t index, bool unpinned) const {
  const Slot& slot = slots_[static_cast<size_t>(index)];
  return slot.state == SlotState::kResident && !slot.expected && !slot.fresh &&
         (unpinned || !slot.pinned);
}

// Fills victims_ with up to `limit` keys that may be evicted for `layer`, best first.
void Planner::collect_victims(int32_t layer, size_t limit, bool unpinned) {
  victims_.clear();
  if (limit == 0) return;
  if (config_.order == Order::kRecency) {
    const int32_t end = static_cast<int32_t>(slots_.size()) + pool_of(layer);
    for (int32_t index = newer_[static_cast<size_t>(end)];
         index != end && victims_.size() < limit; index = newer_[static_cast<size_t>(index)]) {
      if (may_go(index, unpinned)) victims_.push_back(slots_[static_cast<size_t>(index)].key);
    }
    return;
  }
  const bool per_layer = config_.scope == Scope::kPerLayer;
  const int32_t begin = per_layer ? key_of(layer, 0) : 0;
  const int32_t end =
      per_layer ? key_of(layer, config_.num_experts) : static_cast<int32_t>(page_table_.size());
  const auto less = [this](int32_t a, int32_t b) { return victim_is_less(a, b); };
  for (int32_t block = begin; block < end; block += kBlock) {
    // A max-heap of the best victims so far. Most blocks hold nothing better than its worst,
    // and of equal scores the earlier key goes first.
    if (victims_.size() == limit) {
      block = first_block_below(scores_.data(), barrier_.data(), block, end,
                                scores_[static_cast<size_t>(victims_.front())]);
    }
    const int32_t block_end = std::min(block + kBlock, end);
    for (int32_t key = block; key < block_end; ++key) {
      if (barrier_[static_cast<size_t>(key)] != 0.0F) continue;
      const bool full = victims_.size() == limit;
      if (full && !less(key, victims_.front())) continue;
      if (!may_go(page_table_[static_cast<size_t>(key)], unpinned)) continue;
      if (full) {
        std::pop_heap(victims_.begin(), victims_.end(), less);
        victims_.back() = key;
      } else {
        victims_.push_back(key);
      }
      std::push_heap(victims_.begin(), victims_.end(), less);
    }
  }
  std::sort_heap(victims_.begin(), victims_.end(), less);
}

// Takes a slot out of its recency list, or moves it to the list's newest end.
void Planner::unlink(int32_t index) {
  if (newer_.empty()) return;
  const int32_t older = older_[static_cast<size_t>(index)];
  const int32_t newer = newer_[static_cast<size_t>(index)];
  newer_[static_cast<size_t>(older)] = newer;
  older_[static_cast<size_t>(newer)] = older;
}

void Planner::link_newest(int32_t index, int32_t layer) {
  if (newer_.empty()) return;
  const int32_t end = static_cast<int32_t>(slots_.size()) + pool_of(layer);
  const int32_t older = older_[static_cast<size_t>(end)];
  newer_[static_cast<size_t>(older)] = index;
  older_[static_cast<size_t>(index)] = older;
  newer_[static_cast<size_t>(index)] = end;
  older_[static_cast<size_t>(end)] = index;
}

void Planner::release(int32_t index) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  page_table_[static_cast<size_t>(slot.key)] = -1;
  if (!slot.transient) {
    barrier_[static_cast<size_t>(slot.key)] = kInfinity;
    unlink(index);
    --occupied_[static_cast<size_t>(pool_of(slot.key / config_.num_experts))];
    if (slot.state == SlotState::kResident) --num_resident_;
  }
  slot = Slot{};
  if (!fixed_slots_) free_.push_back(index);
}

void Planner::evict(int32_t index) {
  ++counters_.evictions;
  if (slots_[static_cast<size_t>(index)].prefetched) ++counters_.prefetch_wasted;
  release(index);
}

void Planner::occupy(int32_t index, int32_t key, SlotState state, bool transient) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  slot.key = key;
  slot.state = state;
  slot.transient = transient;
  page_table_[static_cast<size_t>(key)] = index;
  if (transient) return;
  const int32_t layer = key / config_.num_experts;
  barrier_[static_cast<size_t>(key)] = 0.0F;
  link_newest(index, layer);
  ++occupied_[static_cast<size_t>(pool_of(layer))];
  if (state == SlotState::kResident) ++num_resident_;
}

int32_t Planner::take_free() {
  const int32_t index = free_.back();
  free_.pop_back();
  return index;
}

void Planner::check_plannable(int32_t layer) const {
  if (open_layer_ >= 0) {
    throw std::logic_error("layer " + std::to_string(layer) +
                           " planned while the plan of layer " + std::to_string(open_layer_) +
                           " is open");
  }
  require(layer >= 0 && layer < config_.num_layers,
          "layer " + std::to_string(layer) + " is outside [0, " +
              std::to_string(config_.num_layers) + ")");
}

// Finds or makes slots for plan_.experts, and opens the plan; false if they do not fit.
bool Planner::place_need(int32_t layer, uint32_t flags) {
  const bool transient = (flags & kPlanTransient) != 0;
  const bool unpinned = (flags & kPlanUnpinned) != 0;
  const bool instant = (flags & kPlanInstant) != 0;

  // Hits first, before any change.
  const size_t num_needed = plan_.experts.size();
  plan_.slots.assign(num_needed, -1);
  plan_.miss_experts.clear();
  plan_.miss_slots.clear();
  plan_.miss_kinds.clear();
  plan_.num_hits = 0;
  missing_.clear();
  size_t num_awaited = 0;
  for (size_t i = 0; i < num_needed; ++i) {
    const int32_t index = slot_of(layer, plan_.experts[i]);
    plan_.slots[i] = index;
    if (index < 0) {
      missing_.push_back(static_cast<int32_t>(i));
    } else if (slots_[static_cast<size_t>(index)].state == SlotState::kResident) {
      ++plan_.num_hits;
    } else {
      ++num_awaited;
    }
  }

  // Does the need fit? Pinning marks what must not be chosen as a victim.
  for (const int32_t index : plan_.slots) {
    if (index >= 0) slots_[static_cast<size_t>(index)].pinned = true;
  }
  const size_t num_missing = missing_.size();
  const size_t num_free = fixed_slots_ ? num_missing : free_.size();
  const size_t num_wanting = num_missing - std::min(num_missing, num_free);
  collect_victims(layer, num_wanting, unpinned);
  if (victims_.size() < num_wanting && !expected_.empty()) {
    forget_expected(-1);  // a need outweighs an expectation
    collect_victims(layer, num_wanting, unpinned);
  }
  if (victims_.size() < num_wanting) {
    for (const int32_t index : plan_.slots) {
      if (index >= 0) slots_[static_cast<size_t>(index)].pinned = false;
    }
    return false;
  }

  // From here on the plan succeeds.
  open_layer_ = layer;
  open_flags_ = flags;
  if (!transient) count(layer, num_missing, num_awaited);
  for (size_t i = 0; num_awaited > 0 && i < num_needed; ++i) {
    const int32_t index = plan_.slots[i];
    if (index >= 0 && slots_[static_cast<size_t>(index)].state == SlotState::kLoading) {
      plan_.miss_experts.push_back(plan_.experts[i]);
      plan_.miss_slots.push_back(index);
      plan_.miss_kinds.push_back(static_cast<int32_t>(MissKind::kAwait));
    }
  }
  for (const int32_t victim : victims_) evict(page_table_[static_cast<size_t>(victim)]);
  for (const int32_t missing : missing_) {
    const auto i = static_cast<size_t>(missing);
    const int32_t key = key_of(layer, plan_.experts[i]);
    const int32_t index = fixed_slots_ ? key : take_free();
    // In a slot of its own an expert may stay: nobody is displaced.
    const bool leaves = transient && !fixed_slots_;
    occupy(index, key, instant ? SlotState::kResident : SlotState::kLoading, leaves);
    Slot& slot = slots_[static_cast<size_t>(index)];
    slot.pinned = true;
    slot.fresh = !transient;
    plan_.slots[i] = index;
    plan_.miss_experts.push_back(plan_.experts[i]);
    plan_.miss_slots.push_back(index);
    plan_.miss_kinds.push_back(static_cast<int32_t>(MissKind::kRead));
  }
  if (!newer_.empty() && !transient) {
    // Uses of one call are equally recent: ascending, hits and misses alike.
    for (const int32_t index : plan_.slots) {
      unlink(index);
      link_newest(index, layer);
    }
  }
  return true;
}

void Planner::count(int32_t layer, size_t num_misses, size_t num_awaited) {
  ++clock_;
  ++counters_.calls;
  counters_.hits += plan_.num_hits;
  counters_.misses += static_cast<int64_t>(num_misses + num_awaited);
  counters_.prefetch_late += static_cast<int64_t>(num_awaited);
  for (size_t i = 0; i < plan_.experts.size(); ++i) {
    last_use_[static_cast<size_t>(key_of(layer, plan_.experts[i]))] = clock_;
    if (plan_.slots[i] < 0) continue;
    Slot& slot = slots_[static_cast<size_t>(plan_.slots[i])];
    if (slot.prefetched && slot.state == SlotState::kResident) ++counters_.prefetch_useful;
    slot.prefetched = false;
  }
}

void Planner::finish() {
  if (open_layer_ < 0) throw std::logic_error("finish() without an open plan");
  if (!expected_.empty()) forget_expected(open_layer_);
  for (const int32_t index : plan_.slots) {
    if (index < 0) continue;
    const Slot& slot = slots_[static_cast<size_t>(index)];
    if (slot.state == SlotState::kLoading || slot.transient) release(index);
  }
  trim(open_layer_, (open_flags_ & kPlanUnpinned) != 0);
  for (const int32_t index : plan_.slots) {
    if (index < 0) continue;
    Slot& slot = slots_[static_cast<size_t>(index)];
    slot.pinned = false;
    slot.fresh = false;
  }
  open_layer_ = -1;
}

// Brings the pool of `layer` down to its slots: the misses of the open plan and the other
// residents compete for them.
void Planner::trim(int32_t layer, bool unpinned) {
  const int32_t over = occupied_[static_cast<size_t>(pool_of(layer))] - slots_per_pool_;
  if (over <= 0 || fixed_slots_) return;
  fresh_.clear();
  for (const int32_t index : plan_.slots) {
    if (index >= 0 && slots_[static_cast<size_t>(index)].fresh) fresh_.push_back(index);
  }
  const auto key_in = [this](int32_t index) { return slots_[static_cast<size_t>(index)].key; };
  if (config_.admission) {  // the most valuable choose first, so that the best of both stay
    std::stable_sort(fresh_.begin(), fresh_.end(),
                     [&](int32_t a, int32_t b) { return outscores(key_in(a), key_in(b)); });
  }
  const auto num_over = static_cast<size_t>(over);
  if (num_over > fresh_.size()) throw std::logic_error("more slots occupied than may be");
  collect_victims(layer, num_over, unpinned);
  size_t next_victim = 0;
  for (size_t i = fresh_.size() - num_over; i < fresh_.size(); ++i) {
    const bool has_victim = next_victim < victims_.size();
    if (has_victim &&
        (!config_.admission || outscores(key_in(fresh_[i]), victims_[next_victim]))) {
      evict(page_table_[static_cast<size_t>(victims_[next_victim++])]);
    } else {
      ++counters_.bypasses;
      release(fresh_[i]);
    }
  }
}

void Planner::expect(int32_t index) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  if (slot.expected) return;
  slot.expected = true;
  expected_.push_back(index);
}

// Those of `layer` (-1: all) may be evicted again.
void Planner::forget_expected(int32_t layer) {
  const auto is_over = [&](int32_t index) {
    Slot& slot = slots_[static_cast<size_t>(index)];
    if (slot.expected && layer >= 0 && slot.key / config_.num_experts != layer) return false;
    slot.expected = false;
    return true;
  };
  expected_.erase(std::remove_if(expected_.begin(), expected_.end(), is_over), expected_.end());
}

void Planner::complete(int32_t index, bool ok) {
  require(index >= 0 && static_cast<size_t>(index) < slots_.size() &&
              slots_[static_cast<size_t>(index)].state == SlotState::kLoading,
          "slot " + std::to_string(index) + " has no read under way");
  Slot& slot = slots_[static_cast<size_t>(index)];
  if (ok) {
    slot.state = SlotState::kResident;
    if (!slot.transient) ++num_resident_;
    return;
  }
  if (slot.prefetched) ++counters_.prefetch_wasted;
  release(index);
  for (int32_t& planned : plan_.slots) {
    if (open_layer_ >= 0 && planned == index) planned = -1;
  }
}

int32_t Planner::prefetch(int32_t layer, int32_t expert, float value) {
  require(config_.order == Order::kScore && config_.scope == Scope::kGlobal,
          "prefetch needs score order and global scope");
  require(
      layer >= 0 && layer < config_.num_layers && expert >= 0 && expert < config_.num_experts,
      "expert (" + std::to_string(layer) + ", " + std::to_string(expert) + ") does not exist");
  const int32_t key = key_of(layer, expert);
  const int32_t present = page_table_[static_cast<size_t>(key)];
  if (present >= 0) {
    if (!slots_[static_cast<size_t>(present)].transient) expect(present);
    return -1;
  }
  int32_t index = -1;
  if (fixed_slots_) {
    index = key;
  } else if (occupied_[0] < slots_per_pool_ && !free_.empty()) {
    index = take_free();
  } else {
    collect_victims(layer, 1, /*unpinned=*/false);
    if (victims_.empty() || !(value > scores_[static_cast<size_t>(victims_[0])])) return -1;
    evict(page_table_[static_cast<size_t>(victims_[0])]);
    index = take_free();
  }
  occupy(index, key, SlotState::kLoading, /*transient=*/false);
  slots_[static_cast<size_t>(index)].prefetched = true;
  expect(index);
  ++counters_.prefetch_issued;
  return index;
}

void Planner::cancel_prefetch(int32_t index) {
  require(index >= 0 && static_cast<size_t>(index) < slots_.size() &&
              slots_[static_cast<size_t>(index)].state == SlotState::kLoading &&
              !slots_[static_cast<size_t>(index)].pinned,
          "slot " + std::to_string(index) + " has no prefetch that can be cancelled");
  --counters_.prefetch_issued;
  release(index);
}

}  // namespace vmo
