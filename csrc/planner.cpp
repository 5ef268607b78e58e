#include "planner.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

namespace vmo {

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Keys scanned at a time for a victim; small enough that few are looked at one by one.
constexpr int32_t kBlock = 64;

// Least of score + barrier. Lanes, because the compiler may not reorder one running minimum
// of floats and would compare them one by one.
float least_of(const float* scores, const float* barrier, int32_t count) {
  constexpr int32_t kLanes = 8;
  std::array<float, kLanes> least;
  least.fill(kInfinity);
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const float value = scores[i + lane] + barrier[i + lane];
      float& smallest = least[static_cast<size_t>(lane)];
      smallest = value < smallest ? value : smallest;
    }
  }
  for (; i < count; ++i) least[0] = std::min(least[0], scores[i] + barrier[i]);
  return *std::min_element(least.begin(), least.end());
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

  // Everything fits: (layer, expert) gets row layer * num_experts + expert, so that each
  // layer's rows are one contiguous view in logical order and ids need no remapping.
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

  const bool per_layer = config.scope == Scope::kPerLayer;
  const int32_t num_pools = per_layer ? config.num_layers : 1;
  const int32_t per_pool = config.num_slots / num_pools;
  free_slots_.resize(static_cast<size_t>(num_pools));
  for (int32_t pool = 0; pool < num_pools; ++pool) {
    auto& stack = free_slots_[static_cast<size_t>(pool)];
    for (int32_t i = per_pool - 1; i >= 0; --i) stack.push_back(pool * per_pool + i);
  }
  if (config.order == Order::kRecency) {
    newer_.resize(static_cast<size_t>(config.num_slots) + free_slots_.size());
    std::iota(newer_.begin(), newer_.end(), 0);
    older_ = newer_;
  }
  for (int32_t i = config.num_staging_slots - 1; i >= 0; --i) {
    free_staging_.push_back(config.num_slots + i);
  }
}

bool Planner::is_resident(int32_t layer, int32_t expert) const {
  const int32_t slot = slot_of(layer, expert);
  return slot >= 0 && slots_[static_cast<size_t>(slot)].state == SlotState::kResident;
}

void Planner::collect_need(const int32_t* ids, int64_t num_ids) {
  for (int64_t i = 0; i < num_ids; ++i) {
    const int32_t id = ids[i];
    if (id < 0 || id >= config_.num_experts) {
      std::memset(needed_.data(), 0, needed_.size());
      throw std::invalid_argument("expert id " + std::to_string(id) + " at position " +
                                  std::to_string(i) + " is outside [0, " +
                                  std::to_string(config_.num_experts) + ")");
    }
    needed_[static_cast<size_t>(id)] = 1;
  }
  plan_.experts.clear();
  for (int32_t e = 0; e < config_.num_experts; ++e) {
    if (needed_[static_cast<size_t>(e)] != 0) plan_.experts.push_back(e);
  }
  std::memset(needed_.data(), 0, needed_.size());
}

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
  return slot.state == SlotState::kResident && !slot.expected && (unpinned || !slot.pinned);
}

// Fills victims_ with up to `limit` keys that may be evicted for `layer`, best first.
void Planner::collect_victims(int32_t layer, size_t limit, bool unpinned) {
  victims_.clear();
  if (limit == 0) return;
  if (config_.order == Order::kRecency) {
    const int32_t end = config_.num_slots + pool_of(layer);
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
    const int32_t block_end = std::min(block + kBlock, end);
    // A max-heap of the best victims so far. Most blocks hold nothing better than its worst,
    // and of equal scores the earlier key goes first.
    if (victims_.size() == limit &&
        least_of(&scores_[static_cast<size_t>(block)], &barrier_[static_cast<size_t>(block)],
                 block_end - block) >= scores_[static_cast<size_t>(victims_.front())]) {
      continue;
    }
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
  if (newer_.empty() || index >= config_.num_slots) return;
  const int32_t older = older_[static_cast<size_t>(index)];
  const int32_t newer = newer_[static_cast<size_t>(index)];
  newer_[static_cast<size_t>(older)] = newer;
  older_[static_cast<size_t>(newer)] = older;
}

void Planner::link_newest(int32_t index, int32_t layer) {
  if (newer_.empty() || index >= config_.num_slots) return;
  const int32_t end = config_.num_slots + pool_of(layer);
  const int32_t older = older_[static_cast<size_t>(end)];
  newer_[static_cast<size_t>(older)] = index;
  older_[static_cast<size_t>(index)] = older;
  newer_[static_cast<size_t>(index)] = end;
  older_[static_cast<size_t>(end)] = index;
}

void Planner::release(int32_t index) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  if (slot.key >= 0) {
    page_table_[static_cast<size_t>(slot.key)] = -1;
    barrier_[static_cast<size_t>(slot.key)] = kInfinity;
    unlink(index);
    if (slot.state == SlotState::kResident && index < config_.num_slots) --num_resident_;
  }
  const int32_t layer = slot.key >= 0 ? slot.key / config_.num_experts : 0;
  slot = Slot{};
  if (index >= config_.num_slots) {
    free_staging_.push_back(index);
  } else if (!fixed_slots_) {
    free_slots_[static_cast<size_t>(pool_of(layer))].push_back(index);
  }
}

void Planner::evict(int32_t index) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  ++counters_.evictions;
  if (slot.prefetched) ++counters_.prefetch_wasted;
  release(index);
}

void Planner::occupy(int32_t index, int32_t key, SlotState state) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  slot.key = key;
  slot.state = state;
  page_table_[static_cast<size_t>(key)] = index;
  if (index < config_.num_slots) barrier_[static_cast<size_t>(key)] = 0.0F;
  link_newest(index, key / config_.num_experts);
  if (state == SlotState::kResident && index < config_.num_slots) ++num_resident_;
}

int32_t Planner::take_free(int32_t layer) {
  auto& stack = free_slots_[static_cast<size_t>(pool_of(layer))];
  const int32_t index = stack.back();
  stack.pop_back();
  return index;
}

bool Planner::plan(int32_t layer, const int32_t* ids, int64_t num_ids, uint32_t flags) {
  if (open_layer_ >= 0) {
    throw std::logic_error("layer " + std::to_string(layer) +
                           " planned while the plan of layer " + std::to_string(open_layer_) +
                           " is open");
  }
  require(layer >= 0 && layer < config_.num_layers,
          "layer " + std::to_string(layer) + " is outside [0, " +
              std::to_string(config_.num_layers) + ")");
  const bool transient = (flags & kPlanTransient) != 0;
  const bool unpinned = (flags & kPlanUnpinned) != 0;
  const bool instant = (flags & kPlanInstant) != 0;
  collect_need(ids, num_ids);

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
  auto& free_stack = free_slots_[static_cast<size_t>(pool_of(layer))];
  const size_t num_missing = missing_.size();
  const size_t num_free = fixed_slots_ ? num_missing : free_stack.size();
  if (num_missing > num_free) {
    collect_victims(layer, num_missing, unpinned);
  } else {
    victims_.clear();
  }
  const auto fits = [&] {
    return config_.unbounded_staging ||
           num_missing <= num_free + free_staging_.size() + victims_.size();
  };
  if (!fits() && !expected_.empty()) {
    forget_expected(-1);  // a need outweighs an expectation
    collect_victims(layer, num_missing, unpinned);
  }
  if (!fits()) {
    for (const int32_t index : plan_.slots) {
      if (index >= 0) slots_[static_cast<size_t>(index)].pinned = false;
    }
    return false;
  }

  // From here on the plan succeeds.
  open_layer_ = layer;
  open_flags_ = flags;
  if (!transient) {
    ++clock_;
    ++counters_.calls;
    counters_.hits += plan_.num_hits;
    counters_.misses += static_cast<int64_t>(num_missing + num_awaited);
    counters_.prefetch_late += static_cast<int64_t>(num_awaited);
    for (size_t i = 0; i < num_needed; ++i) {
      last_use_[static_cast<size_t>(key_of(layer, plan_.experts[i]))] = clock_;
      if (plan_.slots[i] < 0) continue;
      Slot& slot = slots_[static_cast<size_t>(plan_.slots[i])];
      if (slot.prefetched && slot.state == SlotState::kResident) ++counters_.prefetch_useful;
      slot.prefetched = false;
    }
  }
  for (size_t i = 0; i < num_needed; ++i) {
    const int32_t index = plan_.slots[i];
    if (index >= 0 && slots_[static_cast<size_t>(index)].state == SlotState::kLoading) {
      plan_.miss_experts.push_back(plan_.experts[i]);
      plan_.miss_slots.push_back(index);
      plan_.miss_kinds.push_back(static_cast<int32_t>(MissKind::kAwait));
    }
  }

  // Most valuable misses choose first, so that what is kept is the best of both.
  if (config_.admission && !transient) {
    std::stable_sort(missing_.begin(), missing_.end(), [&](int32_t a, int32_t b) {
      const auto ka = static_cast<size_t>(key_of(layer, plan_.experts[static_cast<size_t>(a)]));
      const auto kb = static_cast<size_t>(key_of(layer, plan_.experts[static_cast<size_t>(b)]));
      return scores_[ka] > scores_[kb];
    });
  }
  size_t next_victim = 0;
  for (size_t m = 0; m < num_missing; ++m) {
    const auto i = static_cast<size_t>(missing_[m]);
    const int32_t key = key_of(layer, plan_.experts[i]);
    int32_t index = -1;
    bool kept = true;
    const bool has_victim = next_victim < victims_.size();
    if (transient) {
      kept = false;
      if (!free_staging_.empty()) {
        index = free_staging_.back();
        free_staging_.pop_back();
      } else if (fixed_slots_ || !free_stack.empty()) {
        index = fixed_slots_ ? key : take_free(layer);
        kept = fixed_slots_;  // its own row: nothing is displaced by staying
      } else if (!has_victim) {
        // Only unbounded staging gets here: the need would not have fitted otherwise.
        plan_.miss_experts.push_back(plan_.experts[i]);
        plan_.miss_slots.push_back(-1);
        plan_.miss_kinds.push_back(static_cast<int32_t>(MissKind::kNoSlot));
        continue;
      }
    } else if (fixed_slots_) {
      index = key;
    } else if (!free_stack.empty()) {
      index = take_free(layer);
    } else if (has_victim && (!config_.admission || outscores(key, victims_[next_victim]))) {
      // falls through to the eviction below
    } else if (!free_staging_.empty()) {
      index = free_staging_.back();
      free_staging_.pop_back();
      kept = false;
    } else if (config_.unbounded_staging) {
      kept = false;
      ++counters_.bypasses;
      plan_.miss_experts.push_back(plan_.experts[i]);
      plan_.miss_slots.push_back(-1);
      plan_.miss_kinds.push_back(static_cast<int32_t>(MissKind::kNoSlot));
      continue;
    }
    if (index < 0) {
      // Admitted over a resident; or forced, because staging is full: the least valuable
      // resident then makes room, and the newcomer will be the next to go.
      const int32_t victim = page_table_[static_cast<size_t>(victims_[next_victim++])];
      evict(victim);
      index = take_free(layer);
    }
    if (!kept && !transient) ++counters_.bypasses;
    occupy(index, key, instant ? SlotState::kResident : SlotState::kLoading);
    Slot& slot = slots_[static_cast<size_t>(index)];
    slot.pinned = !unpinned;
    slot.transient = !kept || index >= config_.num_slots;
    plan_.slots[i] = index;
    plan_.miss_experts.push_back(plan_.experts[i]);
    plan_.miss_slots.push_back(index);
    plan_.miss_kinds.push_back(static_cast<int32_t>(MissKind::kRead));
  }
  if (!newer_.empty() && !transient) {
    // Uses of one call are equally recent: ascending, hits and misses alike.
    for (size_t i = 0; i < num_needed; ++i) {
      const int32_t index = plan_.slots[i];
      if (index < 0 || slot_of(layer, plan_.experts[i]) != index) continue;
      unlink(index);
      link_newest(index, layer);
    }
  }
  return true;
}

void Planner::drive(int32_t first_layer, int32_t num_layers, const int32_t* ids,
                    int64_t ids_per_layer, const float* gain, float decay) {
  require(config_.unbounded_staging, "drive needs a planner with unbounded staging");
  require(first_layer >= 0 && num_layers >= 0 && num_layers <= config_.num_layers - first_layer,
          "layers [" + std::to_string(first_layer) + ", " +
              std::to_string(first_layer + num_layers) + ") are not all in [0, " +
              std::to_string(config_.num_layers) + ")");
  for (int32_t i = 0; i < num_layers; ++i) {
    const int32_t layer = first_layer + i;
    if (gain != nullptr) {
      float* row = &scores_[static_cast<size_t>(key_of(layer, 0))];
      const float* added = gain + static_cast<int64_t>(i) * config_.num_experts;
      for (int32_t e = 0; e < config_.num_experts; ++e) row[e] = row[e] * decay + added[e];
    }
    plan(layer, ids + i * ids_per_layer, ids_per_layer, kPlanInstant);
    finish();
  }
}

void Planner::finish() {
  if (open_layer_ < 0) throw std::logic_error("finish() without an open plan");
  for (const int32_t index : plan_.slots) {
    if (index < 0) continue;
    Slot& slot = slots_[static_cast<size_t>(index)];
    // Belady's bound evicts within its own need: the row may have a new owner by now.
    slot.pinned = false;
    if (slot.key < 0) continue;
    if (slot.state == SlotState::kLoading || slot.transient) release(index);
  }
  if (!expected_.empty()) forget_expected(open_layer_);
  open_layer_ = -1;
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
    if (index < config_.num_slots) ++num_resident_;
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
    if (present < config_.num_slots) expect(present);
    return -1;
  }
  int32_t index = -1;
  if (fixed_slots_) {
    index = key;
  } else if (!free_slots_[0].empty()) {
    index = take_free(layer);
  } else {
    collect_victims(layer, 1, /*unpinned=*/false);
    if (victims_.empty() || !(value > scores_[static_cast<size_t>(victims_[0])])) return -1;
    evict(page_table_[static_cast<size_t>(victims_[0])]);
    index = take_free(layer);
  }
  occupy(index, key, SlotState::kLoading);
  slots_[static_cast<size_t>(index)].prefetched = true;
  expect(index);
  ++counters_.prefetch_issued;
  return index;
}

void Planner::cancel_prefetch(int32_t index) {
  require(index >= 0 && index < config_.num_slots &&
              slots_[static_cast<size_t>(index)].state == SlotState::kLoading &&
              !slots_[static_cast<size_t>(index)].pinned,
          "slot " + std::to_string(index) + " has no prefetch that can be cancelled");
  --counters_.prefetch_issued;
  release(index);
}

}  // namespace vmo
