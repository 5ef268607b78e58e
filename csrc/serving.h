// One layer call from the routing to the slots, with all that is due at it, in a single native
// call: at one token per step an interpreter would take as long for it as the kernel's tenth.
#pragma once

#include <cstdint>

#include "c_api.h"
#include "lookahead.h"
#include "planner.h"

namespace vmo {

// Plain data of the caller's, part of the C ABI. What an observer is for: policy/trace.py, and
// PlainPolicy in policy/plain.py.
using Observer = ::vmo_observer;
using LayerOutcome = ::vmo_layer_outcome;

// out[e] = sum over tokens of weight * (times the token chose e); weights null means 1 each.
// VMO_NO_EXPERT counts nowhere. Throws std::invalid_argument on any other id that is no expert.
template <typename Id>
void histogram(const Id* ids, int64_t num_tokens, int32_t top_k, const float* weights,
               int32_t num_experts, float* out);

// Observes, plans, names slots and, if nothing is missing, looks ahead with `lookahead`, which
// is that of the call or null. False if the need does not fit: then nothing but the observation
// happened.
bool serve_layer(Planner& planner, RouterLookahead* lookahead, const LayerCall& call,
                 LayerOutcome& outcome);

}  // namespace vmo
