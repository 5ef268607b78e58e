// Which expert lies in which slot, and what one layer call has to change about it.
//
// Rows are alike. Between layer calls at most num_slots of them are occupied; what a layer call
// misses goes into free slots at first, and who has to leave for it is decided when the call is
// done (finish()): its misses compete with what is cached by the scores of that moment, which
// a policy may have brought up to date while they were read.
//
// The planner never touches bytes: it owns the page table, the slot states, the
// keep-score table that a policy writes, the recency clock and the counters. Serving,
// replay and tests drive this one implementation.
//
// Not thread safe: one planner belongs to one model runner, which calls layers in order.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "c_api.h"

namespace vmo {

enum class Order : int32_t {
  kScore = 0,    // least keep-score goes first
  kRecency = 1,  // least recently used goes first
};

enum class Scope : int32_t {
  kGlobal = 0,    // all layers compete for all slots
  kPerLayer = 1,  // every layer owns num_slots / num_layers slots
};

struct PlannerConfig {
  int32_t num_layers = 0;
  int32_t num_experts = 0;
  int32_t num_slots = 0;          // experts that stay between layer calls
  int32_t num_staging_slots = 0;  // slots beyond that, for the misses of a layer call
  Order order = Order::kScore;
  Scope scope = Scope::kGlobal;
  bool admission = true;  // a miss must outscore a resident to replace it
};

enum PlanFlags : uint32_t {
  kPlanDefault = 0,
  // No request stands behind this call: serve it, but count and keep nothing.
  kPlanTransient = 1U << 0,
  // Replay of a bound (Belady) only: the current need may be evicted once counted.
  kPlanUnpinned = 1U << 1,
  // Replay: reads take no time, misses are resident at once.
  kPlanInstant = 1U << 2,
};

enum class MissKind : int32_t {
  kRead = 0,   // the record must be read into the slot
  kAwait = 1,  // a prefetch into this slot is under way: wait for it
};

// One layer call. Vectors are reserved for num_experts once: their addresses never change.
struct Plan {
  std::vector<int32_t> experts;  // distinct experts needed, ascending
  std::vector<int32_t> slots;    // their slots
  std::vector<int32_t> miss_experts;
  std::vector<int32_t> miss_slots;
  std::vector<int32_t> miss_kinds;
  int32_t num_hits = 0;
};

// Part of the C ABI.
using Counters = ::vmo_counters;
using PlannerView = ::vmo_planner_view;

class Planner {
 public:
  explicit Planner(const PlannerConfig& config);

  // Plans one layer call for `ids` (any order, repeats and VMO_NO_EXPERT allowed). Misses get
  // free slots; those for which there is none evict the least valuable residents at once.
  // Returns false and changes nothing if the distinct experts do not fit at once.
  // Needed experts stay pinned until finish(). Throws std::invalid_argument on an id
  // outside [0, num_experts) and std::logic_error if a plan is still open. `Id` is int32_t or
  // int64_t.
  template <typename Id>
  bool plan(int32_t layer, const Id* ids, int64_t num_ids, uint32_t flags) {
    check_plannable(layer);
    collect_need(ids, num_ids);
    return place_need(layer, flags);
  }
  const Plan& current() const { return plan_; }

  // Ends the open plan: unpins, empties transient slots, and decides who stays: while more than
  // num_slots slots are occupied, the least valuable go, misses of this call that do not
  // outscore a resident (admission) among them; its hits stay. Every read of the plan must have
  // ended; one that was not completed leaves its slot empty.
  void finish();

  // A read into `slot` ended. `ok` false empties the slot.
  void complete(int32_t slot, bool ok);

  // (layer, expert) is expected to be used soon, which is worth `value` on the scale of the
  // scores. Reserves a slot for a prefetch of it; -1 if it is resident or in flight already,
  // or nothing worth less may be evicted. Either way it is no victim until its layer was
  // served, unless a plan would not fit otherwise. Score order and global scope only.
  int32_t prefetch(int32_t layer, int32_t expert, float value);

  // Gives a reserved slot back because its read was cancelled before it began.
  void cancel_prefetch(int32_t slot);

  int32_t slot_of(int32_t layer, int32_t expert) const {
    return page_table_[static_cast<size_t>(key_of(layer, expert))];
  }
  // Whether (layer, expert)'s slot holds its bytes (false while in flight).
  bool is_resident(int32_t layer, int32_t expert) const;

  const PlannerConfig& config() const { return config_; }
  const int32_t* page_table() const { return page_table_.data(); }
  // Where tables, counters and the current plan are; valid while the planner stays in place.
  PlannerView view();

 private:
  enum class SlotState : uint8_t { kFree, kLoading, kResident };
  struct Slot {
    int32_t key = -1;  // layer * num_experts + expert
    SlotState state = SlotState::kFree;
    bool pinned = false;
    bool transient = false;   // emptied by finish(); counts as nobody's
    bool fresh = false;       // a miss of the open plan: finish() decides whether it stays
    bool prefetched = false;  // not used since it was prefetched
    bool expected = false;    // named by prefetch(); its layer was not served since
  };

  int32_t key_of(int32_t layer, int32_t expert) const {
    return layer * config_.num_experts + expert;
  }
  int32_t pool_of(int32_t layer) const { return config_.scope == Scope::kPerLayer ? layer : 0; }
  void check_plannable(int32_t layer) const;
  template <typename Id>
  void collect_need(const Id* ids, int64_t num_ids);
  bool place_need(int32_t layer, uint32_t flags);
  void collect_victims(int32_t layer, size_t limit, bool unpinned);
  bool victim_is_less(int32_t a_key, int32_t b_key) const;
  bool outscores(int32_t key, int32_t victim_key) const;
  bool may_go(int32_t slot, bool unpinned) const;
  void unlink(int32_t slot);
  void link_newest(int32_t slot, int32_t layer);
  void evict(int32_t slot);
  void occupy(int32_t slot, int32_t key, SlotState state, bool transient);
  void release(int32_t slot);
  int32_t take_free();
  void count(int32_t layer, size_t num_misses, size_t num_awaited);
  void trim(int32_t layer, bool unpinned);
  void expect(int32_t slot);
  void forget_expected(int32_t layer);

  PlannerConfig config_;
  bool fixed_slots_ = false;
  std::vector<Slot> slots_;
  std::vector<int32_t> page_table_;
  std::vector<float> scores_;
  std::vector<uint64_t> last_use_;
  std::vector<int32_t> free_;      // stack of slots, lowest on top at first
  std::vector<int32_t> occupied_;  // per pool (a layer's, or all): slots that are not transient
  int32_t slots_per_pool_ = 0;
  // Per key, 0 for what has a slot to stay in, else infinity: scores + barrier has its least
  // where the victim may be. Kept beside the slots because it is scanned as a whole.
  std::vector<float> barrier_;
  // Recency order only: per pool a ring of its slots from the oldest use to the newest, in
  // which slot (number of slots) + pool stands for the two ends.
  std::vector<int32_t> newer_;
  std::vector<int32_t> older_;
  std::vector<uint8_t> needed_;    // bitmap scratch [num_experts]
  std::vector<int32_t> victims_;   // scratch: keys, best victim first
  std::vector<int32_t> missing_;   // scratch: expert indices in plan_.experts
  std::vector<int32_t> fresh_;     // scratch: slots of the misses that compete
  std::vector<int32_t> expected_;  // slots that are, or were until released, expected
  Plan plan_;
  int32_t open_layer_ = -1;
  uint32_t open_flags_ = 0;
  uint64_t clock_ = 0;
  int32_t num_resident_ = 0;
  Counters counters_{};
};

}  // namespace vmo
