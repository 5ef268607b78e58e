// How the scores of the trace policy follow the routing within a step (policy/trace.py).
#pragma once

#include <cstdint>

namespace vmo {

// scores[i] = scores[i] * decay + (votes[i] * gain - fade[i]); fade null: 0.
void follow(float* scores, const float* votes, const float* fade, float gain, float decay,
            int64_t count);

// Routing of consecutive layers, and the successor model (policy/value.py) that it changes.
struct ValueStep {
  float* values = nullptr;  // [requests, size], the model's forecasts, brought up to date
  const float* weights = nullptr;  // [size, size]
  const float* states = nullptr;   // [requests, size], before the step
  int64_t size = 0;                // num_layers * num_experts
  int32_t num_layers = 0;
  int32_t num_experts = 0;
  int32_t first_layer = 0;
  int32_t end_layer = 0;
  const int32_t* ids = nullptr;     // [end_layer - first_layer, rows, top_k]
  const int32_t* owners = nullptr;  // [rows], index into running
  int32_t num_rows = 0;
  int32_t top_k = 0;
  const int64_t* running = nullptr;  // [num_running], the requests of the step
  const float* kept = nullptr;       // [num_running], what the step leaves of a state
  int32_t num_running = 0;
  float use = 0.0F;                // what a use adds to a state
  float* scores = nullptr;         // [num_layers, num_experts]
  const float* factors = nullptr;  // [num_layers], of a forecast's change in the score
};

// Adds to the scores what the forecasts, clipped to [0, 1] and summed over the requests, change
// by. Throws std::invalid_argument on an id that is no expert.
void follow_values(const ValueStep& step);

}  // namespace vmo
