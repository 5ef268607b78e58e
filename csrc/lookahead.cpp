#include "lookahead.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>

namespace vmo {

namespace {

struct Scale {
  float boundary;
  float bins_per_logit;
};

Scale scale_of(const float* logits, int32_t num_experts, int32_t top_k,
               std::vector<float>& scratch) {
  scratch.assign(logits, logits + num_experts);
  const auto first_out = scratch.begin() + top_k;
  std::nth_element(scratch.begin(), first_out, scratch.end(), std::greater<>());
  const float last_in = *std::min_element(scratch.begin(), first_out);
  float sum = 0.0F;
  for (const float logit : scratch) sum += logit;
  const float mean = sum / static_cast<float>(num_experts);
  float squares = 0.0F;
  for (const float logit : scratch) squares += (logit - mean) * (logit - mean);
  const float deviation = std::sqrt(squares / static_cast<float>(num_experts));
  return {0.5F * (last_in + *first_out), kBinsPerDeviation / (deviation + 1e-12F)};
}

}  // namespace

std::vector<Guess> look_ahead(const float* logits, int32_t num_rows, int64_t stride,
                              int32_t num_experts, int32_t top_k, const int32_t* slots,
                              const float* trust, float threshold, uint8_t* kinds) {
  if (top_k < 1 || top_k >= num_experts) {
    throw std::invalid_argument("top_k must lie in [1, " + std::to_string(num_experts) +
                                "), got " + std::to_string(top_k));
  }
  const auto width = static_cast<size_t>(num_experts);
  std::vector<float> scratch;
  std::vector<float> unused(width, 1.0F);  // probability that no row uses it
  for (int32_t row = 0; row < num_rows; ++row) {
    const size_t begin = static_cast<size_t>(row) * width;
    const float* of_row = logits + row * stride;
    const Scale scale = scale_of(of_row, num_experts, top_k, scratch);
    for (size_t e = 0; e < width; ++e) {
      const float margin = (of_row[e] - scale.boundary) * scale.bins_per_logit;
      const float bin = std::clamp(std::floor(margin) + static_cast<float>(kMarginBins / 2),
                                   0.0F, static_cast<float>(kMarginBins - 1));
      const int32_t kind = static_cast<int32_t>(bin) + (slots[e] < 0 ? kMarginBins : 0);
      kinds[begin + e] = static_cast<uint8_t>(kind);
      unused[e] *= 1.0F - trust[kind];
    }
  }
  std::vector<Guess> guesses;
  for (size_t e = 0; e < width; ++e) {
    const float chance = 1.0F - unused[e];
    if (chance >= threshold) guesses.push_back({static_cast<int32_t>(e), chance});
  }
  std::stable_sort(guesses.begin(), guesses.end(),
                   [](const Guess& a, const Guess& b) { return a.chance > b.chance; });
  return guesses;
}

std::vector<ReservedRow> foresee(Planner& planner, const float* logits, int32_t num_rows,
                                 int64_t stride, int32_t first_layer, int32_t num_layers,
                                 int32_t top_k, const float* trust, float threshold,
                                 float value, int32_t max_reads, uint8_t* kinds,
                                 int32_t& num_asked) {
  const int32_t num_experts = planner.config().num_experts;
  if (first_layer < 0 || num_layers < 0 ||
      num_layers > planner.config().num_layers - first_layer) {
    throw std::invalid_argument("layers [" + std::to_string(first_layer) + ", " +
                                std::to_string(first_layer + num_layers) +
                                ") do not all exist");
  }
  std::vector<ReservedRow> reserved;
  const auto is_full = [&] { return reserved.size() >= static_cast<size_t>(max_reads); };
  for (num_asked = 0; num_asked < num_layers && !is_full(); ++num_asked) {
    const int32_t layer = first_layer + num_asked;
    const int32_t* slots = planner.page_table() + static_cast<int64_t>(layer) * num_experts;
    const std::vector<Guess> guesses = look_ahead(
        logits + static_cast<int64_t>(num_asked) * num_experts, num_rows, stride, num_experts,
        top_k, slots, trust + static_cast<int64_t>(num_asked) * 2 * kMarginBins, threshold,
        kinds + static_cast<int64_t>(num_asked) * num_rows * num_experts);
    for (const Guess& guess : guesses) {
      if (slots[guess.expert] < 0 && is_full()) continue;
      const int32_t slot = planner.prefetch(layer, guess.expert, guess.chance * value);
      if (slot >= 0) reserved.push_back({layer, guess.expert, slot});
    }
  }
  return reserved;
}

void judge(const uint8_t* kinds, int32_t num_rows, int32_t num_experts, const int64_t* ids,
           int32_t top_k, float* tried, float* right) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const uint8_t* of_row = kinds + row * num_experts;
    for (int32_t e = 0; e < num_experts; ++e) tried[of_row[e]] += 1.0F;
    for (int32_t k = 0; k < top_k; ++k) {
      const int64_t id = ids[row * top_k + k];
      if (id < 0 || id >= num_experts) {
        throw std::invalid_argument("expert id " + std::to_string(id) + " is outside [0, " +
                                    std::to_string(num_experts) + ")");
      }
      right[of_row[id]] += 1.0F;
    }
  }
}

}  // namespace vmo
