// What early answers of a router are worth (vllm_moe_offload/lookahead.py tells the idea).
#pragma once

#include <cstdint>
#include <vector>

#include "planner.h"

namespace vmo {

// Margins lie in bins of 1 / kBinsPerDeviation standard deviations around the boundary
// between what the router would choose and what not, which is the middle one's lower end.
inline constexpr int32_t kMarginBins = 16;
inline constexpr float kBinsPerDeviation = 4.0F;

struct Guess {
  int32_t expert;
  float chance;
};

// Which experts a layer will probably use, judged by its router's logits.
//
// `logits` [num_rows, num_experts], rows `stride` apart; `slots` [num_experts], the layer's
// page table, negative for what is absent; `trust` [2, kMarginBins], how often a guess of each
// kind (resident or absent, margin) was right; `kinds` [num_rows, num_experts] receives each
// guess's kind. Returns the experts that at least one row uses with a probability of
// `threshold` or more, most probable first, ties by expert. Throws std::invalid_argument unless
// 0 < top_k < num_experts.
std::vector<Guess> look_ahead(const float* logits, int32_t num_rows, int64_t stride,
                              int32_t num_experts, int32_t top_k, const int32_t* slots,
                              const float* trust, float threshold, uint8_t* kinds);

// A row reserved for an expert that is to be read ahead.
struct ReservedRow {
  int32_t layer;
  int32_t expert;
  int32_t slot;
};

// Guesses for several layers in a row, nearest first, and what a prefetcher makes of them: what
// is likely and resident becomes expected (Planner::prefetch), for what is likely and absent
// rows are reserved, worth chance * `value`, until there are `max_reads`; the layers behind are
// not looked at any more.
//
// `logits` [num_rows, num_layers, num_experts], rows `stride` apart, of layers from
// `first_layer` on; `trust` [num_layers, 2, kMarginBins]; `kinds`
// [num_layers, num_rows, num_experts]. Sets `num_asked` to the layers looked at.
std::vector<ReservedRow> foresee(Planner& planner, const float* logits, int32_t num_rows,
                                 int64_t stride, int32_t first_layer, int32_t num_layers,
                                 int32_t top_k, const float* trust, float threshold,
                                 float value, int32_t max_reads, uint8_t* kinds,
                                 int32_t& num_asked);

// What became of guesses: of their `kinds` [num_rows, num_experts], all are added to `tried`
// and those in `ids` [num_rows, top_k] to `right`, both [2, kMarginBins]. Throws
// std::invalid_argument on an id out of range, with both unchanged or partly added to.
void judge(const uint8_t* kinds, int32_t num_rows, int32_t num_experts, const int64_t* ids,
           int32_t top_k, float* tried, float* right);

}  // namespace vmo
