// How the scores of the trace policy follow the routing within a step (policy/trace.py).
#pragma once

#include <cstdint>

#include "c_api.h"

namespace vmo {

// scores[i] = scores[i] * decay + (votes[i] * gain - fade[i]); fade null: 0.
void follow(float* scores, const float* votes, const float* fade, float gain, float decay,
            int64_t count);

// Part of the C ABI.
using ValueStep = ::vmo_value_step;

// Adds to the scores what the forecasts, clipped to [0, 1] and summed over the requests, change
// by. VMO_NO_EXPERT counts nowhere; throws std::invalid_argument on any other
// id that is no expert.
void follow_values(const ValueStep& step);

}  // namespace vmo
