#include "lookahead.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>

#include "wide.h"

namespace vmo {

namespace {

// Kind of what was not guessed about, besides the 2 * kMarginBins kinds of guesses.
constexpr uint8_t kNoGuess = 0xFF;
static_assert(2 * kMarginBins <= kNoGuess);

struct Guess {
  int32_t expert;
  float chance;
};

struct Scale {
  float boundary;
  float bins_per_logit;
};

// Nothing if a logit is not finite, or is so large that a sum of them is not: a client may send
// such a hidden state, and what has no order can neither be ranked nor be put into a bin.
std::optional<Scale> scale_of(const float* logits, int32_t num_experts, int32_t top_k,
                              std::vector<float>& scratch) {
  scratch.assign(logits, logits + num_experts);
  const auto is_finite = [](float logit) { return std::isfinite(logit); };
  if (!std::all_of(scratch.begin(), scratch.end(), is_finite)) return std::nullopt;
  const auto first_out = scratch.begin() + top_k;
  std::nth_element(scratch.begin(), first_out, scratch.end(), std::greater<>());
  const float last_in = *std::min_element(scratch.begin(), first_out);
  float sum = 0.0F;
  for (const float logit : scratch) sum += logit;
  const float mean = sum / static_cast<float>(num_experts);
  float squares = 0.0F;
  for (const float logit : scratch) squares += (logit - mean) * (logit - mean);
  const float deviation = std::sqrt(squares / static_cast<float>(num_experts));
  const float boundary = 0.5F * (last_in + *first_out);
  if (!std::isfinite(boundary) || !std::isfinite(deviation)) return std::nullopt;
  return Scale{boundary, kBinsPerDeviation / (deviation + 1e-12F)};
}

float to_float(float value) { return value; }
float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value = 0.0F;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float half_to_float(uint16_t half) {
  const int32_t exponent = (half >> 10) & 0x1F;
  const int32_t fraction = half & 0x3FF;
  float value = 0.0F;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else if (exponent == 31) {
    value = fraction == 0 ? INFINITY : NAN;
  } else {
    value = std::ldexp(static_cast<float>(fraction | 0x400), exponent - 25);
  }
  return (half & 0x8000) != 0 ? -value : value;
}

// Sums in lanes, because the compiler may not reorder one running sum of floats.
template <typename Weight>
inline __attribute__((always_inline)) float dot_of(const float* a, const Weight* b,
                                                   int64_t count) {
  constexpr int64_t kLanes = 16;
  std::array<float, kLanes> sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[static_cast<size_t>(lane)] += a[i + lane] * to_float(b[i + lane]);
    }
  }
  for (; i < count; ++i) sums[0] += a[i] * to_float(b[i]);
  float total = 0.0F;
  for (const float sum : sums) total += sum;
  return total;
}

VMO_WIDE float dot(const float* a, const float* b, int64_t count) {
  return dot_of(a, b, count);
}
VMO_WIDE float dot(const float* a, const uint16_t* b, int64_t count) {
  return dot_of(a, b, count);
}

void require(bool condition, const char* name, int32_t value, const char* allowed) {
  if (condition) return;
  throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " +
                              std::to_string(value));
}

// Which of the first `num_own` experts a layer will probably use, judged by its router's
// `logits` [num_tokens, num_experts]; `slots` [num_own], the layer's page table, negative for
// what is absent; `trust` [2, kMarginBins]; `kinds` [num_tokens, num_own] receives each guess's
// kind, kNoGuess all along a token whose logits say nothing. Experts that at least one token
// uses with a probability of `threshold` or more, most probable first, ties by expert.
std::vector<Guess> look_ahead(const float* logits, int32_t num_tokens, int32_t num_experts,
                              int32_t num_own, int32_t top_k, const int32_t* slots,
                              const float* trust, float threshold, uint8_t* kinds) {
  const auto width = static_cast<size_t>(num_own);
  std::vector<float> scratch;
  std::vector<float> unused(width, 1.0F);  // probability that no token uses it
  for (int32_t token = 0; token < num_tokens; ++token) {
    const size_t begin = static_cast<size_t>(token) * width;
    const float* of_token = logits + static_cast<int64_t>(token) * num_experts;
    const std::optional<Scale> scale = scale_of(of_token, num_experts, top_k, scratch);
    if (!scale) {
      std::fill_n(kinds + begin, width, kNoGuess);
      continue;
    }
    for (size_t e = 0; e < width; ++e) {
      const float margin = (of_token[e] - scale->boundary) * scale->bins_per_logit;
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

// What became of guesses: of their `kinds` [num_tokens, num_own], all are added to `tried`
// and those in `ids` [num_tokens, top_k] to `right`, both [2, kMarginBins]. A token that chose
// no expert is padding, about which nothing was guessed, unless others have experts as well; of
// kNoGuess there is nothing to judge.
void judge(const uint8_t* kinds, int32_t num_tokens, int32_t num_own, bool has_all,
           const int64_t* ids, int32_t top_k, float* tried, float* right) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    const uint8_t* of_token = kinds + token * num_own;
    const int64_t* chosen = ids + token * top_k;
    if (of_token[0] == kNoGuess) continue;
    if (has_all && std::count(chosen, chosen + top_k, VMO_NO_EXPERT) == top_k) continue;
    for (int32_t e = 0; e < num_own; ++e) tried[of_token[e]] += 1.0F;
    for (int32_t k = 0; k < top_k; ++k) {
      const int64_t id = chosen[k];
      if (id == VMO_NO_EXPERT) continue;
      if (id < 0 || id >= num_own) {
        throw std::invalid_argument("expert id " + std::to_string(id) + " is outside [0, " +
                                    std::to_string(num_own) + ")");
      }
      right[of_token[id]] += 1.0F;
    }
  }
}

}  // namespace

RouterLookahead::RouterLookahead(const LookaheadConfig& config, const RouterWeights& routers,
                                 const Evidence& evidence)
    : config_(config),
      routers_(routers),
      evidence_(evidence),
      guesses_(static_cast<size_t>(std::max(config.depth, 0))) {
  require(config.num_layers > 0, "num_layers", config.num_layers, "positive");
  require(config.hidden_size > 0, "hidden_size", config.hidden_size, "positive");
  require(config.depth > 0, "depth", config.depth, "positive");
  require(config.max_tokens > 0, "max_tokens", config.max_tokens, "positive");
  require(config.top_k > 0 && config.top_k < config.num_experts, "top_k", config.top_k,
          "positive and less than the number of experts");
  require(config.num_own_experts > 0 && config.num_own_experts <= config.num_experts,
          "num_own_experts", config.num_own_experts,
          "positive and at most the number of experts");
  require(routers.type != FloatType::kFloat16, "the routers' type", 2, "float32 or bfloat16");
}

int32_t RouterLookahead::begin_step(int64_t num_tokens) {
  num_tokens_ = num_tokens;
  num_asked_ = static_cast<int32_t>(std::min<int64_t>(num_tokens, config_.max_tokens));
  for (std::vector<uint8_t>& kinds : guesses_) kinds.clear();
  ++num_steps_;
  watched_ = static_cast<int32_t>(num_steps_ % config_.num_layers);
  return watched_;
}

template <typename Id>
void RouterLookahead::observe(int32_t layer, const Id* ids) {
  if (layer != watched_) return;
  ids_.clear();
  for (int32_t token = 0; token < num_asked_; ++token) {
    const Id* of_token = ids + sampled(token) * config_.top_k;
    ids_.insert(ids_.end(), of_token, of_token + config_.top_k);
  }
  constexpr size_t kKinds = 2 * kMarginBins;
  const size_t size = kKinds * guesses_.size();
  for (size_t i = 0; i < size; ++i) {
    evidence_.tried[i] *= config_.memory;
    evidence_.right[i] *= config_.memory;
  }
  for (size_t distance = 0; distance < guesses_.size(); ++distance) {
    if (guesses_[distance].empty()) continue;
    judge(guesses_[distance].data(), num_asked_, config_.num_own_experts,
          config_.num_own_experts == config_.num_experts, ids_.data(), config_.top_k,
          evidence_.tried + kKinds * distance, evidence_.right + kKinds * distance);
  }
  for (size_t i = 0; i < size; ++i) {
    // Evidence that faded to nothing leaves the trust that it gave.
    if (evidence_.tried[i] > 0.0F) evidence_.trust[i] = evidence_.right[i] / evidence_.tried[i];
  }
}

template void RouterLookahead::observe(int32_t, const int32_t*);
template void RouterLookahead::observe(int32_t, const int64_t*);

void RouterLookahead::convert(const void* hidden, FloatType type, int64_t stride) {
  const auto width = static_cast<int64_t>(config_.hidden_size);
  hidden_.resize(static_cast<size_t>(num_asked_ * width));
  for (int32_t token = 0; token < num_asked_; ++token) {
    const int64_t begin = sampled(token) * stride;
    float* to = &hidden_[static_cast<size_t>(token * width)];
    if (type == FloatType::kFloat32) {
      std::copy_n(static_cast<const float*>(hidden) + begin, width, to);
      continue;
    }
    const uint16_t* from = static_cast<const uint16_t*>(hidden) + begin;
    const bool brain = type == FloatType::kBFloat16;
    std::transform(from, from + width, to, [brain](uint16_t value) {
      return brain ? to_float(value) : half_to_float(value);
    });
  }
}

void RouterLookahead::ask(int32_t layer) {
  const auto width = static_cast<int64_t>(config_.hidden_size);
  const auto num_experts = static_cast<int64_t>(config_.num_experts);
  logits_.resize(static_cast<size_t>(num_asked_ * num_experts));
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t router = layer * num_experts + e;
    const float bias = routers_.bias != nullptr ? routers_.bias[router] : 0.0F;
    for (int64_t token = 0; token < num_asked_; ++token) {
      const float* given = &hidden_[static_cast<size_t>(token * width)];
      const float product =
          routers_.type == FloatType::kFloat32
              ? dot(given, static_cast<const float*>(routers_.weight) + router * width, width)
              : dot(given, static_cast<const uint16_t*>(routers_.weight) + router * width,
                    width);
      logits_[static_cast<size_t>(token * num_experts + e)] = product + bias;
    }
  }
}

int32_t RouterLookahead::foresee(Planner& planner, const LayerCall& call) {
  const int32_t num_own = config_.num_own_experts;
  // A drafter's layers, which lie behind the model's, are not asked about.
  if (planner.config().num_experts != num_own ||
      planner.config().num_layers < config_.num_layers) {
    throw std::invalid_argument("the planner is one of another model");
  }
  const int32_t end = std::min(call.layer + 1 + config_.depth, config_.num_layers);
  if (num_asked_ == 0 || call.layer < 0 || call.layer + 1 >= end || call.max_reads <= 0) {
    return 0;
  }
  convert(call.hidden, static_cast<FloatType>(call.hidden_type), call.hidden_stride);
  kinds_.resize(static_cast<size_t>(num_asked_) * static_cast<size_t>(num_own));
  int32_t num_reads = 0;
  for (int32_t target = call.layer + 1; target < end && num_reads < call.max_reads; ++target) {
    const auto distance = static_cast<size_t>(target - call.layer - 1);
    ask(target);
    const int32_t* slots = planner.page_table() + static_cast<int64_t>(target) * num_own;
    const std::vector<Guess> guesses = look_ahead(
        logits_.data(), num_asked_, config_.num_experts, num_own, config_.top_k, slots,
        evidence_.trust + 2 * kMarginBins * distance, call.threshold, kinds_.data());
    if (target == watched_) guesses_[distance] = kinds_;
    for (const Guess& guess : guesses) {
      if (slots[guess.expert] < 0 && num_reads >= call.max_reads) continue;
      const int32_t slot = planner.prefetch(target, guess.expert, guess.chance * call.value);
      if (slot >= 0) call.reads[num_reads++] = {target, guess.expert, slot};
    }
  }
  return num_reads;
}

}  // namespace vmo
