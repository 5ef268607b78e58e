// One layer call from the routing to the rows, with all that is due at it, in a single native
// call: at one token per step an interpreter would take as long for it as the kernel's tenth.
#pragma once

#include <cstdint>

#include "c_api.h"
#include "lookahead.h"
#include "planner.h"

namespace vmo {

// Where a policy keeps what the step routed to, and how its scores follow (policy/trace.py and
// PlainPolicy in policy/base.py). Plain data that the policy owns and fills; part of the C ABI,
// therefore.
using Observer = ::vmo_observer;

struct LayerCall {
  int32_t layer = 0;
  const void* ids = nullptr;  // [num_padded_rows, top_k]
  int32_t id_bytes = 4;       // 4 or 8, of ids and rows
  int32_t top_k = 0;
  int64_t num_rows = 0;  // rows that are tokens; the others are padding
  int64_t num_padded_rows = 0;
  uint32_t flags = 0;              // PlanFlags
  const float* weights = nullptr;  // [num_rows], the rows' votes
  void* rows = nullptr;            // receives the pool row of every id
  const void* hidden = nullptr;    // what the router was given; null: do not look ahead
  FloatType hidden_type = FloatType::kFloat32;
  int64_t hidden_stride = 0;
  float threshold = 0.0F;  // as RouterLookahead::foresee
  float value = 0.0F;
  int32_t max_reads = 0;
};

struct LayerOutcome {
  bool fits = false;
  int32_t num_experts = 0;
  int32_t num_hits = 0;
  int32_t num_misses = 0;
  int32_t num_reads = 0;  // to be read ahead, written to `reads`
  int64_t policy_ns = 0;  // spent on observing and looking ahead
};

// out[e] = sum over rows of weight * (times the row chose e); weights null means 1 each. Throws
// std::invalid_argument on an id that is no expert.
template <typename Id>
void histogram(const Id* ids, int64_t num_rows, int32_t top_k, const float* weights,
               int32_t num_experts, float* out);

// Writes the row of every planned id; ids from num_ids on are padding and get the first one's.
template <typename Id>
void remap(const Planner& planner, int32_t layer, const Id* ids, int64_t num_ids,
           int64_t num_padded_ids, Id* rows);

// int64 ids as int32; throws std::invalid_argument on one that does not fit.
void narrow(const int64_t* ids, int64_t count, int32_t* out);

// Observes (`observer` may be null), plans, names rows and, if nothing is missing, looks ahead
// (`lookahead` may be null). `reads` [max_reads, 3] receives layer, expert and slot. If the
// need does not fit, nothing but the observation happened.
LayerOutcome serve_layer(Planner& planner, Observer* observer, RouterLookahead* lookahead,
                         const LayerCall& call, int32_t* reads);

}  // namespace vmo
