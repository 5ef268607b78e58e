#include "follow.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "wide.h"

namespace vmo {

namespace {

VMO_WIDE void add_scaled(float* out, const float* row, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += factor * row[i];
}

VMO_WIDE void add_clipped(float* out, const float* values, float sign, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] < 0.0F ? 0.0F : values[i];
    out[i] += sign * (value > 1.0F ? 1.0F : value);
  }
}

int64_t size_of(const ValueStep& step) {
  return static_cast<int64_t>(step.num_layers) * step.num_experts;
}

// What the layers' routing changes the state of a request by, [layers, num_experts].
void change_of(const ValueStep& step, int32_t request, std::vector<float>& change) {
  const int64_t own = static_cast<int64_t>(step.first_layer) * step.num_experts;
  const float* state = step.states + step.running[request] * size_of(step) + own;
  const float fades = step.kept[request] - 1.0F;
  for (size_t i = 0; i < change.size(); ++i) change[i] = fades * state[i];
  for (int32_t layer = 0; layer < step.end_layer - step.first_layer; ++layer) {
    for (int32_t token = 0; token < step.num_tokens; ++token) {
      if (step.owners[token] != request) continue;
      const int32_t* ids =
          step.ids + (static_cast<int64_t>(layer) * step.num_tokens + token) * step.top_k;
      for (int32_t k = 0; k < step.top_k; ++k) {
        if (ids[k] == VMO_NO_EXPERT) continue;
        if (ids[k] < 0 || ids[k] >= step.num_experts) {
          throw std::invalid_argument("expert id " + std::to_string(ids[k]) +
                                      " is outside [0, " + std::to_string(step.num_experts) +
                                      ")");
        }
        change[static_cast<size_t>(layer * step.num_experts + ids[k])] += step.use;
      }
    }
  }
}

}  // namespace

void follow(float* scores, const float* votes, const float* fade, float gain, float decay,
            int64_t count) {
  if (fade == nullptr) {
    for (int64_t i = 0; i < count; ++i) scores[i] = scores[i] * decay + votes[i] * gain;
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = scores[i] * decay + (votes[i] * gain - fade[i]);
  }
}

void follow_values(const ValueStep& step) {
  const int64_t own = static_cast<int64_t>(step.first_layer) * step.num_experts;
  const int64_t width =
      static_cast<int64_t>(step.end_layer - step.first_layer) * step.num_experts;
  const int64_t size = size_of(step);
  std::vector<float> gained(static_cast<size_t>(size), 0.0F);
  std::vector<float> change(static_cast<size_t>(width));
  for (int32_t request = 0; request < step.num_running; ++request) {
    change_of(step, request, change);
    float* values = step.values + step.running[request] * size;
    add_clipped(gained.data(), values, -1.0F, size);
    for (int64_t i = 0; i < width; ++i) {
      const float factor = change[static_cast<size_t>(i)];
      if (factor != 0.0F) {
        add_scaled(values, step.weights + (own + i) * size, factor, size);
      }
    }
    add_clipped(gained.data(), values, 1.0F, size);
  }
  for (int32_t layer = 0; layer < step.num_layers; ++layer) {
    const int64_t begin = static_cast<int64_t>(layer) * step.num_experts;
    add_scaled(step.scores + begin, &gained[static_cast<size_t>(begin)], step.factors[layer],
               step.num_experts);
  }
}

}  // namespace vmo
