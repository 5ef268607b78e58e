// What early answers of a router are worth (vllm_moe_offload/forecast/lookahead.py tells the
// idea).
#pragma once

#include <cstdint>
#include <vector>

#include "planner.h"

namespace vmo {

// Margins lie in bins of 1 / kBinsPerDeviation standard deviations around the boundary
// between what the router would choose and what not, which is the middle one's lower end.
inline constexpr int32_t kMarginBins = 16;
inline constexpr float kBinsPerDeviation = 4.0F;

// Part of the C ABI.
using LayerCall = ::vmo_layer_call;
using ReservedSlot = ::vmo_reserved_slot;

enum class FloatType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct LookaheadConfig {
  int32_t num_layers = 0;
  int32_t num_experts = 0;  // that the routers choose among
  int32_t num_own_experts =
      0;  // the first of them, which the planner has: guesses are about these
  int32_t hidden_size = 0;
  int32_t top_k = 0;
  int32_t depth = 0;       // layers ahead
  int32_t max_tokens = 0;  // of a step that are asked about
  float memory = 1.0F;     // share of the older evidence that a step keeps
};

// The routers of all layers, asked ahead of their layer; the caller owns what it points to.
struct RouterWeights {
  const void* weight = nullptr;  // [num_layers, num_experts, hidden_size]
  FloatType type = FloatType::kFloat32;
  const float* bias = nullptr;  // [num_layers, num_experts] or null
};

// Evidence about guesses by layers ahead, resident or absent, and margin: how many were made
// and how many of them were right, [depth, 2, kMarginBins] each; trust = right / tried.
struct Evidence {
  float* tried = nullptr;
  float* right = nullptr;
  float* trust = nullptr;
};

// Asks the routers of the next layers and makes of their answers what a prefetcher needs.
class RouterLookahead {
 public:
  // Throws std::invalid_argument on sizes that are not possible.
  RouterLookahead(const LookaheadConfig& config, const RouterWeights& routers,
                  const Evidence& evidence);

  // A step of `num_tokens` tokens begins. Of more than max_tokens, evenly spread ones are asked
  // about. Returns the layer whose guesses observe() will judge.
  int32_t begin_step(int64_t num_tokens);

  // `layer` routed the step's tokens, ids [num_tokens, top_k]: were the guesses right? Guesses
  // about one layer per step are judged, which is enough and costs next to nothing. `Id` is
  // int32_t or int64_t.
  template <typename Id>
  void observe(int32_t layer, const Id* ids);

  // Whether observe() judges guesses about `layer` in this step.
  bool watches(int32_t layer) const { return layer == watched_; }

  // The layers behind the call's, given what its router was given, nearest first, by the tokens
  // whose logits are finite: what is
  // likely and resident becomes expected (Planner::prefetch), for what is likely and absent
  // slots are reserved, worth chance * `value`, and written to `reads`, until there are
  // `max_reads`; the layers behind are not asked any more. Returns how many were reserved.
  int32_t foresee(Planner& planner, const LayerCall& call);

 private:
  int64_t sampled(int32_t token) const { return token * num_tokens_ / num_asked_; }
  void convert(const void* hidden, FloatType type, int64_t stride);
  void ask(int32_t layer);

  LookaheadConfig config_;
  RouterWeights routers_;
  Evidence evidence_;
  int64_t num_tokens_ = 0;
  int32_t num_asked_ = 0;  // tokens of the step that are asked about
  int64_t num_steps_ = 0;
  int32_t watched_ = 0;                        // layer whose guesses are judged in this step
  std::vector<float> hidden_;                  // [num_asked, hidden_size]
  std::vector<float> logits_;                  // [num_asked, num_experts]
  std::vector<uint8_t> kinds_;                 // [num_asked, num_own_experts]
  std::vector<std::vector<uint8_t>> guesses_;  // per distance, about the watched layer
  std::vector<int64_t> ids_;
};

}  // namespace vmo
